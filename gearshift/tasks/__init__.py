"""Tasks: what a policy is trained to do. Each is found by its entry point, see `registry.py`."""
