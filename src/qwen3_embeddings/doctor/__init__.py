"""The doctor: is what an engine or server returns what Qwen3-Embedding should return?"""
