"""Environments that answer in text. An import of this package registers them with Gymnasium."""

from gearshift.environments import registry as registry
