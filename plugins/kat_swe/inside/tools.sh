# Sourced by every bash in the sandbox (BASH_ENV): the agent's tools.
fix() { python3 /opt/swe/task.py fix "$@"; }
show() { python3 /opt/swe/task.py show; }
t() { python3 /opt/swe/task.py t; }
