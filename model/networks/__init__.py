"""The networks: encoder, fusion and decoder."""
