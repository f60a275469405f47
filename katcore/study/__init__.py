"""Studies: what a method does, measured where the answer is known."""
