"""Races of every step against the best tool for that step: `make bench`, or `python -m benchmarks`."""
