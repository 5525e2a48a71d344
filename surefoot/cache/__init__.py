"""What the engine remembers between steps: KV pages, recurrent-state slots, and how many of each the memory holds."""
