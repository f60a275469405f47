"""Inference engines: transformers in this process, vLLM, any API, and a script."""
