"""Versioned weights: published, signed, transported, verified."""
