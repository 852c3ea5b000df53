"""Phases of training, and the loop that all of them share."""
