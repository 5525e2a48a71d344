"""One file per model family. `registry.build(config)` makes the model for a config.json on the meta device."""
