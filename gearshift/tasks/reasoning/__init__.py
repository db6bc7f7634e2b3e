"""The task `reasoning`: see `task`."""
