"""Benchmarks of the proxy and of trajectories, each beside a baseline in the same run."""
