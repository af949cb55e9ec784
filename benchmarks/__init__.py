"""What is claimed of speed and precision, as commands: `python -m benchmarks.NAME`, or `make bench` for all of them.

Every module has `main(miniature: bool = False) -> None`. In miniature it takes the same paths with sizes that need
a few seconds on one core, and starts no cluster; a test runs all of them so. LOG.md has what they said, dated.
"""
