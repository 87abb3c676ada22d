"""Benchmarks that hold syncnorm against what it cannot beat, in one run: `python -m syncnorm bench NAME`."""
