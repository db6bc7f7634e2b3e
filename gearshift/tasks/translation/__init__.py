"""The task `translation`: see `task`."""
