"""Training of DRoRAE tokenizers: data, losses, phases 0 to 3, evaluation, and the bundled checkpoint."""
