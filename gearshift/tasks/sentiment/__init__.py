"""The task `sentiment`: see `task`."""
