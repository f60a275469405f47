"""The `docker` backend: containers of an engine that speaks Docker's API, also podman's."""
