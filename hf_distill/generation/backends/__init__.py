"""Backends that complete prompts: transformers, a server with an OpenAI-compatible API, and vLLM in this process."""
