"""Metrics, and how reconstructions, generated images and latents are measured."""
