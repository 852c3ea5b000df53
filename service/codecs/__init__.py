"""Request bodies to model inputs, and model outputs to bodies."""
