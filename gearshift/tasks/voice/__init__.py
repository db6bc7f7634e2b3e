"""The task `voice`: see `task`."""
