"""Several processes that accept connections, in front of one engine in another."""
