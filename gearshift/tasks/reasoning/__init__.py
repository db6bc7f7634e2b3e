"""The task `reasoning`; see `task.py`."""
