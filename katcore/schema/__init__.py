"""Frozen records that cross a package border, a process border or a restart."""
