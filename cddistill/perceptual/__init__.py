"""Distances that see images as people do: LPIPS, latent LPIPS and its ensemble, features for KID."""
