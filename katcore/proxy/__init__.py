"""The LLM proxy: captures every model call, durably, before its answer is released."""
