"""Images for sandboxes: a declared subset of Dockerfile, and the store that builds it once per content."""
