"""An environment that dies, hangs or refuses, as its row or a file says."""

import ctypes
import os
import signal
import sys
from pathlib import Path
from typing import Any

from tests.gyms import TwoTurns


class Dies(TwoTurns):
    """Rows 1 to 6 go wrong at their first step. It cannot be made where the file REFUSES is."""

    def __init__(self) -> None:
        super().__init__()
        if Path(os.environ.get("REFUSES", "/nowhere")).exists():
            raise ImportError("it needs what is not here")

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        self.row = (options or {}).get("row", 0)
        return super().reset(seed=seed, options=options)

    def step(self, action: str) -> Any:
        match self.row:
            case 1:
                ctypes.string_at(0)
            case 2:
                os._exit(0)
            case 3:
                sys.exit("no")
            case 4:
                signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
                ctypes.PyDLL(None).sleep(3600)  # holds the interpreter's lock
            case 5:
                return "", 1.0, True, False, {"why": lambda: 0}
            case 6:
                raise KeyboardInterrupt
            case 7:
                if child := os.fork():
                    os.waitpid(child, 0)
        return super().step(action)
