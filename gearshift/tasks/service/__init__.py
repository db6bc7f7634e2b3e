"""The task `service`: see `task`."""
