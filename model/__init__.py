"""The DRoRAE tokenizer: frozen ViT encoder, multi-layer fusion, ViT decoder, checkpoints."""
