"""The commands of `sluice`, one file each."""
