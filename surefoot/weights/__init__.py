"""From a model reference to real parameters and a tokenizer: hub, checkpoint, loading, text in and out."""
