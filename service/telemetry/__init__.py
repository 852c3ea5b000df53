"""Logs, metrics, traces, and what is known about a request."""
