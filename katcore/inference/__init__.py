"""Engines behind the proxy; with train, the home of torch."""
