"""The task `tau2`; see `task.py`."""
