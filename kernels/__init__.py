"""The fusion operator: definition, folded form, Triton kernels, and the choice between them."""
