"""The `harbor` backend: cloud sandboxes of any provider that the `harbor` package speaks to."""
