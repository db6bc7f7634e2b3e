"""Environments, rewards and the collector of episodes. Importing this registers the environments
with Gymnasium.
"""

from gearshift.rollouts import gym_text as gym_text
