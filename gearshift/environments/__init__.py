"""Environments that answer in text. Importing this registers them with Gymnasium."""

from gearshift.environments import registry as registry
