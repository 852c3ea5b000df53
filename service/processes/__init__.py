"""The processes of the service: how they begin, what they share, what they say to each other."""
