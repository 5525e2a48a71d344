"""Training of the canaries, the tiny models that ship with the package."""
