"""The hybrid engine: one copy of the weights, a training gear and a generation gear."""

from gearshift.engine.hybrid import Engine, EngineConfig

__all__ = ["Engine", "EngineConfig"]
