"""The commands of `gearshift`."""
