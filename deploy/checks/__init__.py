"""Checks of the deployment that need no container engine: see deploy/README.md."""
