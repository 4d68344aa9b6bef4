"""Operation of a running run: control state, settings, storage."""
