"""The errors a user may meet. Each message is one sentence: the thing, then the way out."""


class GearshiftError(Exception):
    """The base of every error that the user can correct. The command line prints it in one line."""


class ConfigError(GearshiftError):
    """A recipe or an override has a wrong key, type or value."""


class DataError(GearshiftError):
    """A data file or one of its rows cannot be used."""


class OverlongError(DataError):
    """A row has more tokens than its stage or its model takes."""


class ModelError(GearshiftError):
    """A model cannot be found, loaded, or run by the engine."""


class CapacityError(GearshiftError):
    """A request does not fit: a prompt longer than the cache, a sequence longer than the model."""


class KernelError(GearshiftError):
    """Kernels cannot be compiled or captured, or do not belong to the code that calls them."""


class CheckpointError(GearshiftError):
    """A checkpoint is missing, broken, or belongs to another configuration."""


class StorageError(GearshiftError):
    """A file of a run cannot be written or read, or is missing or damaged."""


class FolderInUseError(GearshiftError):
    """Another process, or another thread, writes into the run's folder."""


class ServerError(GearshiftError):
    """A server that the run needs does not answer, or its answers are wrong."""


class RankError(GearshiftError):
    """Another process of the run failed, or did not come in time."""


class NumericalError(GearshiftError):
    """A loss, a gradient or a reward is not finite."""


class InterruptedRunError(GearshiftError):
    """A signal asked the run to stop; its work so far is kept."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal
        """Number of the signal."""


class NotBuiltError(GearshiftError):
    """A planned feature that this version does not have yet."""
