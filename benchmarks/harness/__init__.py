"""What all benchmarks share: timing, results, provenance, a service in a process."""
