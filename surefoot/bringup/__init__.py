"""Bringing a device up: today the selftest; it stands above the engine and the backends."""
