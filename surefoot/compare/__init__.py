"""Models or configurations side by side on the same prompts: time, length, memory, proof and quality of answers."""
