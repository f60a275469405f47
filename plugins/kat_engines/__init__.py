"""Inference engines: scripted and embedded transformers."""
