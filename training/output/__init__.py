"""Outputs of a run: files that are written whole or not at all, tables, figures, grids."""
