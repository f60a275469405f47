"""Judges of the state an agent left behind."""
