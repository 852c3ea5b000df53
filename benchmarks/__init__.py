"""Benchmarks: scripts that anyone with a GPU, or two CPU cores, can run; see README.md beside this."""
