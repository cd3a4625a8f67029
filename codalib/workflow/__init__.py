"""Profiles, a notebook's parameters, a run's manifest, executing a notebook."""
