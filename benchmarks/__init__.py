"""Benchmarks behind the claims on speed and precision: `python -m benchmarks.NAME`, or `make bench` for all of them.

Every module has `main(miniature: bool = False) -> None`. In miniature it runs the same code with small sizes, in a few
seconds on one core, and starts no cluster; a test runs all of them in this way. LOG.md has the results, with dates.
"""
