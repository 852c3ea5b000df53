"""Malformed requests, made of a seed and a number."""
