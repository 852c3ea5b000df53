"""Commands that sample generators, and judge their samples."""
