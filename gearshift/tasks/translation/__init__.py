"""The task `translation`; see `task.py`."""
