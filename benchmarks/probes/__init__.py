"""Requests of the fault scenarios, and how the answers are judged."""
