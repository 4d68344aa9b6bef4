"""Causal language models: built from assets, run packed or padded, scored."""
