"""Deployment: configuration files, and the checks of them that need no container engine (see README.md)."""
