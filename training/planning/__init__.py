"""The dry run: what a phase would need and take."""
