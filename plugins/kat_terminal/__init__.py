"""The Terminal expert: shell work on real files."""
