"""Dataset rows, and prompts made of them."""
