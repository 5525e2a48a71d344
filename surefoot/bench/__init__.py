"""Benchmarks: an engine in this process, or any OpenAI-compatible server. Measured, never subtracted; samples kept."""
