"""One module per stage, and what makes a stage's output immutable and resumable."""
