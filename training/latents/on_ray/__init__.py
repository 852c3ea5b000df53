"""Tokenization by the machines of a Ray cluster (the extra ``drorae[ray]``)."""
