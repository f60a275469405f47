"""Isolated machines: environment images and the local namespace backend."""
