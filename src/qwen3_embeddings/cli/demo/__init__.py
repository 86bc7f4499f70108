"""``qwen3-embeddings demo``: a small corpus, searched through LangChain and LlamaIndex."""
