"""What runs beneath the local backend: standard library only, on the machine's own interpreter.

`server` is one process per backend. It enters a mount namespace that holds nothing but the machine's
programs, imports what sandboxed Python will want, and forks one `machine` (pid 1 of a sandbox) per request.
"""
