"""The embedded engine: continuous batching over any full-attention transformers causal LM."""
