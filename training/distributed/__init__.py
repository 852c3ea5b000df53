"""Devices, ranks, and how modules are spread over them."""
