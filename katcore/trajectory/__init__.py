"""The model-call log, the trajectory tree, and their audit."""
