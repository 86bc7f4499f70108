"""Check that an engine or server returns the vectors that Qwen3-Embedding should return."""
