"""Answers before a run: which operators a model needs, and whether a device has them."""
