"""Shared by all benchmarks: timing, results, provenance, a service in a process."""
