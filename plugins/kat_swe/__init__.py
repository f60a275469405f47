"""The SWE expert: bug repair in real Python packages."""
