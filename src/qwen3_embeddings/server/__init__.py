"""An OpenAI-compatible HTTP server over an engine in this process."""
