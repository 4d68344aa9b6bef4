"""The standalone trainer daemon: consumes batches, publishes policies. Start it with `python -m sluice.trainer`."""
