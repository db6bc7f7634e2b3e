"""The task `sentiment`; see `task.py`."""
