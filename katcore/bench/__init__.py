"""Benchmarks of the proxy, of trajectories and of training, each beside a baseline in the same run."""
