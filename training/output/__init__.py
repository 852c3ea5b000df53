"""What a run writes: files whole or not at all, tables, figures, grids."""
