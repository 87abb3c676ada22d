"""`python -m syncnorm`."""

from .cli import main

main()
