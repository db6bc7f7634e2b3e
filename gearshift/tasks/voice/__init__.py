"""The task `voice_assistant`; see `task.py`."""
