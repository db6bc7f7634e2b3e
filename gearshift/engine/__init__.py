"""The hybrid engine: one copy of the weights, a training gear and a generation gear."""

from gearshift.engine.config import EngineConfig
from gearshift.engine.hybrid import Engine

__all__ = ["Engine", "EngineConfig"]
