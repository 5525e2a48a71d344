"""An OpenAI-compatible HTTP server over one engine in one inference thread."""
