"""One run, one folder: whoever writes into a run's folder holds its lock. The kernel gives it back
when its process ends, however it ends.

Where a file system has no locks, a file that one process alone can make stands for it, and counts
for as long as that process lives.
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
"""Open files of the locks that this process holds."""


@dataclass(frozen=True)
class LockHolder:
    """Who holds a lock."""

    host: str
    pid: int
    since: str
    started: str
    """When the process began, as its machine counts: its number may be another's by now."""

    @staticmethod
    def me() -> LockHolder:
        """This process, from now on."""
        since = datetime.now().astimezone().isoformat(" ", "seconds")
        return LockHolder(socket.gethostname(), os.getpid(), since, _started(os.getpid()))

    @staticmethod
    def read(text: bytes) -> LockHolder | None:
        """None for what is empty, torn, or something else."""
        try:
            holder = LockHolder(**json.loads(text))
        except (ValueError, TypeError, RecursionError):
            return None
        types = [type(value) for value in asdict(holder).values()]
        return holder if types == [str, int, str, str] and holder.pid > 0 else None

    def text(self) -> bytes:
        """As `read` takes it."""
        return json.dumps(asdict(self)).encode()

    def lives(self) -> bool:
        """Whether the process is there, as far as this machine can tell."""
        elsewhere = self.host != socket.gethostname()
        return elsewhere or (self.started != "" and self.started == _started(self.pid))

    def __str__(self) -> str:
        mine = (self.host, self.pid) == (socket.gethostname(), os.getpid())
        who = "this process" if mine else f"process {self.pid} on {one_line(self.host)}"
        return f"{who} since {one_line(self.since)}"


@contextmanager
def lock_run_folder(folder: Path) -> Iterator[None]:
    """Hold the lock of a run's folder, which is made if it is not there.

    Raises `FolderInUseError`, which says who holds it, if another process or thread does.
    """
    with ExitStack() as stack:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            path, me = folder.resolve() / LOCK_FILE, LockHolder.me()
            if not _take(path, me, stack):
                _make(path.with_name(FALLBACK_LOCK_FILE), me, stack)
        yield


def _take(path: Path, me: LockHolder, stack: ExitStack) -> bool:
    """Lock the file until the stack ends; False where the file system has no locks."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    _handles.add(handle)
    stack.callback(_close, handle)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        for _ in range(_TRIES):  # who has just locked it is about to write who it is
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
    """A fork may outlive this process, and must not keep its locks."""
    for handle in [*_handles]:
        _close(handle)


os.register_at_fork(after_in_child=_close_all)


def _make(path: Path, me: LockHolder, stack: ExitStack) -> None:
    """Make the file that stands for a lock, until the stack ends."""
    for tries in range(_TRIES):
        try:
            with path.open("xb") as file:
                file.write(me.text())
        except FileExistsError:
            text = _bytes(path)
            holder = LockHolder.read(text)
            if holder and holder.lives():
                break
            if holder or tries > _TRIES // 2:  # before, it may just be written
                _remove(path, text, me.pid)
            time.sleep(_WAIT)
        else:
            stack.callback(_remove, path, me.text(), me.pid)
            return
    raise _in_use(path, holder, f"; if that is not so, delete {path}")


def _remove(path: Path, text: bytes, by: int) -> None:
    """Take the file with this text away. Of several that would, one alone may: another could
    already have made its own. A fork of the process that made it has no part in it.
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
    """The first bytes; none where it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(4096)
    except OSError:
        return b""


def _started(pid: int) -> str:
    """When a process began, told apart from those before a restart of the machine; "" if there is
    no such process, or its end has only not been noticed yet.
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
    try:  # another system than Linux
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
