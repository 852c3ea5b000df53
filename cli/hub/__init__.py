"""Repositories of a hub as local folders."""
