"""Formatting rules: rollouts to training samples."""
