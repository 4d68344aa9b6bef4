"""The commands of `sluice`, a file per subject."""
