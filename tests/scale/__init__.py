"""Runs on several processes: what they make, and how they end."""
