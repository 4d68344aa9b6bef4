"""One policy over several ranks."""
