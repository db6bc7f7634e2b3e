"""The lock of a run's folder: only one process writes to it. The kernel releases the lock when the
process ends, in whatever way it ends.

On a file system without locks, a file that only one process can create replaces the lock; it is
valid as long as that process lives.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from gearshift.errors import FolderInUseError
from gearshift.runtime.files import writing
from gearshift.runtime.terminal import one_line

LOCK_FILE = "run.lock"
FALLBACK_LOCK_FILE = "run.lock.held"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)
_TRIES, _WAIT = 40, 0.05
_handles: set[int] = set()
"""The open lock files of this process."""


@dataclass(frozen=True)
class LockHolder:
    """The process that holds a lock."""

    host: str
    pid: int
    since: str
    started: str
    """When the process started, by its machine's clock: a later process may get the same number."""

    @staticmethod
    def me() -> LockHolder:
        """This process, as the holder from now on."""
        since = datetime.now().astimezone().isoformat(" ", "seconds")
        return LockHolder(socket.gethostname(), os.getpid(), since, process_start(os.getpid()))

    @staticmethod
    def read(text: bytes) -> LockHolder | None:
        """Parse the text of a lock file; None if it is empty, incomplete, or something else."""
        try:
            holder = LockHolder(**json.loads(text))
        except (ValueError, TypeError, RecursionError):
            return None
        types = [type(value) for value in asdict(holder).values()]
        return holder if types == [str, int, str, str] and holder.pid > 0 else None

    def text(self) -> bytes:
        """The text of a lock file, which `read` parses."""
        return json.dumps(asdict(self)).encode()

    def lives(self) -> bool:
        """Whether the process still exists, as far as this machine can see."""
        elsewhere = self.host != socket.gethostname()
        return elsewhere or (self.started != "" and self.started == process_start(self.pid))

    def __str__(self) -> str:
        mine = (self.host, self.pid) == (socket.gethostname(), os.getpid())
        who = "this process" if mine else f"process {self.pid} on {one_line(self.host)}"
        return f"{who} since {one_line(self.since)}"


@contextmanager
def lock_run_folder(folder: Path) -> Iterator[None]:
    """Hold the lock of a run's folder; the folder is created if it does not exist.

    Raises `FolderInUseError`, with the holder's name, if another process or thread holds it.
    """
    with ExitStack() as stack:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            path, me = folder.resolve() / LOCK_FILE, LockHolder.me()
            if not _take(path, me, stack):
                _make(path.with_name(FALLBACK_LOCK_FILE), me, stack)
        yield


def holder_of(folder: Path) -> LockHolder | None:
    """The living process that holds the lock of a run's folder."""
    for name in (LOCK_FILE, FALLBACK_LOCK_FILE):
        holder = LockHolder.read(_bytes(folder / name))
        if holder and holder.lives():
            return holder
    return None


def _take(path: Path, me: LockHolder, stack: ExitStack) -> bool:
    """Lock the file until the stack closes; returns False where the file system has no locks."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    _handles.add(handle)
    stack.callback(_close, handle)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        for _ in range(_TRIES):  # the new holder may not have written its name yet
            holder = LockHolder.read(_bytes(path))
            if holder and holder.lives():
                break
            time.sleep(_WAIT)
        raise _in_use(path, holder) from None
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return False
        raise
    os.ftruncate(handle, 0)
    os.pwrite(handle, me.text(), 0)
    stack.callback(_clear, handle)
    return True


def _clear(handle: int) -> None:
    if handle in _handles:
        with suppress(OSError):
            os.ftruncate(handle, 0)


def _close(handle: int) -> None:
    if handle in _handles:
        _handles.remove(handle)
        os.close(handle)


def _close_all() -> None:
    """Close the lock files in a forked child, which may outlive this process."""
    for handle in [*_handles]:
        _close(handle)


os.register_at_fork(after_in_child=_close_all)


def _make(path: Path, me: LockHolder, stack: ExitStack) -> None:
    """Create the file that replaces a lock, and remove it when the stack closes."""
    for tries in range(_TRIES):
        try:
            with path.open("xb") as file:
                file.write(me.text())
        except FileExistsError:
            text = _bytes(path)
            holder = LockHolder.read(text)
            if holder and holder.lives():
                break
            if holder or tries > _TRIES // 2:  # until then the holder may still be writing it
                _remove(path, text, me.pid)
            time.sleep(_WAIT)
        else:
            stack.callback(_remove, path, me.text(), me.pid)
            return
    raise _in_use(path, holder, f"; if that is not so, delete {path}")


def _remove(path: Path, text: bytes, by: int) -> None:
    """Remove the file if it has this text. Of several processes that try, only one may do so:
    another could already have created its own file. A fork of the process that created it does
    nothing.
    """
    claim = path.with_name(f"{path.name}.{hashlib.blake2b(text, digest_size=4).hexdigest()}")
    if os.getpid() != by:
        return
    with suppress(FileExistsError):
        claim.touch(exist_ok=False)
        if _bytes(path) == text:
            path.unlink(missing_ok=True)
        claim.unlink(missing_ok=True)


def _bytes(path: Path) -> bytes:
    """The first bytes of the file; empty if it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(4096)
    except OSError:
        return b""


def process_start(pid: int) -> str:
    """When a process started, unique across restarts of the machine; "" if there is no such
    process, or it has ended and its parent has not noticed yet.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        state, *others = fields.rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return "" if state in "ZX" else f"{boot}/{others[18]}"
    except OSError:
        pass
    if Path("/proc/self").exists():
        return ""
    try:  # systems other than Linux
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except OSError:
        pass
    return "there"


def _in_use(path: Path, holder: LockHolder | None, more: str = "") -> FolderInUseError:
    who = holder or "another process"
    return FolderInUseError(
        f"{path.parent} is in use by {who}; wait for it, stop it, or choose another run.dir{more}."
    )
