"""What `sluice run` starts on this machine, and how it ends."""
