"""Sluice from Python: `sluice.train`, `sluice.start`, `sluice.load`, and what a script or a notebook gives them."""
