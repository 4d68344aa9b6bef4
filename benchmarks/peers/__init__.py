"""Sides of a comparison, each a process of its own: `python -m benchmarks.peers.NAME` from the checkout."""
