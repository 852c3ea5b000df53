"""Faults that the service must bear."""
