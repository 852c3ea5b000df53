"""Recipes: every phase's configuration, and those of the paper and of mini."""
