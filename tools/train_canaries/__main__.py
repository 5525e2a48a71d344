"""``python -m tools.train_canaries``."""

from .train import main

main()
