"""Sources of tasks: Harbor task directories on disk."""
