"""A client of an OpenAI-compatible embeddings server."""
