"""The service under load and under faults, measured from outside."""
