"""Promises of the whole program, checked with processes, kills and full disks."""
