"""Runs one task once (single) or many, losing none (collect)."""
