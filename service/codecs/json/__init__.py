"""JSON bodies, read and written in slices."""
