"""Data and latents in object storage, or wherever fsspec reaches."""
