"""Benchmarks of syncnorm beside other implementations and plain copies: `python -m syncnorm bench NAME`."""
