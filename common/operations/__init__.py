"""How a run is operated while it goes on: orders, settings, the number of workers."""
