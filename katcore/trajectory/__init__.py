"""Trajectories: the call log, the tree it gives, and the formats that are pure functions of it."""
