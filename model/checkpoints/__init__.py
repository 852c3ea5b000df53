"""Checkpoint directories on disk."""
