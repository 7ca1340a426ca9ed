"""Measured speed and accuracy, each runnable as `python benchmarks/NAME.py`."""
