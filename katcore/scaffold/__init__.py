"""Coding agents around a model endpoint."""
