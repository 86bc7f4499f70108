"""The command line: ``qwen3-embeddings COMMAND``."""
