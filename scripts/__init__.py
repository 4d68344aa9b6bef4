"""The commands a user types: thin, on top of the other floors."""
