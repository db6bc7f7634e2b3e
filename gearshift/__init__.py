"""Gearshift: align language models with reinforcement learning on one copy of the weights."""

__version__ = "0.1.0"
