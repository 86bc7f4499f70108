"""Qwen3 in plain PyTorch, in this process."""
