"""Data computed once, before training: latents and text embeddings, and pairs of noise and x0."""
