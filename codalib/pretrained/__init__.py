"""Frozen pretrained networks, where their weights come from, perceptual distances, layouts of published VAEs."""
