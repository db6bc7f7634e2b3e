"""A program that nobody trusts, run where it can reach nothing: bubblewrap's namespaces (no
network, no process of the host, no file but Python's own, nothing writable), a system-call filter
(no second process, no socket), and limits. It knows programs and what they print, no reward.

What keeps a program in stands in this one file and is never optional: where no sandbox can be had,
nothing runs.
"""

from __future__ import annotations

import compileall
import json
import math
import os
import platform
import select
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Literal

from gearshift.errors import ConfigError
from gearshift.rewards import sandbox_child as inside
from gearshift.rewards.sandbox_child import PASSED, PROGRAM, TESTS, UNUSABLE

Status = Literal["ok", "error", "timeout", "output", "unusable"]
_INSIDE = "/box/gearshift/rollouts/inside"
_START = """
import sys
sys.path.insert(0, "/box")
from gearshift.rewards.sandbox_child.main import main
main()
"""
_OUT_OF_TIME = (128 + signal.SIGKILL, 128 + signal.SIGXCPU)

# (x86_64, aarch64) numbers of what a lone program that computes has no use for. None: not there.
_DENIED: dict[str, tuple[int | None, int | None]] = {
    "fork": (57, None), "vfork": (58, None), "clone": (56, 220), "clone3": (435, 435),
    "socket": (41, 198), "socketpair": (53, 199),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "pidfd_open": (434, 434), "pidfd_getfd": (438, 438), "pidfd_send_signal": (424, 424),
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
    "unshare": (272, 97), "setns": (308, 268), "open_tree": (428, 428), "move_mount": (429, 429),
    "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433),
    "mount_setattr": (442, 442), "mknod": (133, None), "mknodat": (259, 33),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "fanotify_init": (300, 262),
    "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    # Memory that no limit counts.
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194),
    "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180),
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106),
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "reboot": (169, 142),
    "swapon": (167, 224), "swapoff": (168, 225), "personality": (135, 92), "acct": (163, 89),
    "quotactl": (179, 60), "syslog": (103, 116), "settimeofday": (164, 170),
    "clock_settime": (227, 112), "modify_ldt": (154, None),
}  # fmt: skip


@dataclass(frozen=True)
class Limits:
    """What one program may use. It is one process, whose threads run one after the other where they
    are started, and writes no files.
    """

    seconds: float = 5.0
    """Of the processor, rounded up; by the clock three times as long, since training shares it."""
    memory_mib: int = 512
    """Address space."""
    output_kib: int = 256
    """Printed, on each of standard output and error."""
    files: int = 32
    """Open at a time."""

    def end(self) -> float:
        """When a program that starts now has to be over, by `time.monotonic`."""
        return time.monotonic() + 3 * self.seconds


@dataclass(frozen=True)
class Outcome:
    """How a program ended, and what it printed."""

    status: Status
    """`ok`; `error` (an exception, a signal, an exit code other than 0); `timeout`; `output` (it
    printed too much); `unusable` (the tests cannot be put to any program).
    """
    stdout: str = ""
    why: str = ""
    """The tests are unusable."""


class LostError(Exception):
    """The sandbox did not come up this time: nothing is known of the program."""


def run_sandboxed(code: str, stdin: str = "", limits: Limits = Limits()) -> Outcome:
    """Run a Python program.

    Raises `ConfigError` where there is no sandbox, `LostError` if it failed this once.
    """
    _probe()
    return _run(code, stdin, limits)


def check_sandboxed(
    code: str, tests: str, limits: Limits = Limits(), entry_point: str = ""
) -> Outcome:
    """Run tests (`assert f(2) == 4`; any statements, unittest's and pytest's forms) on a program.

    Tests and program are in two sandboxes: a name that the tests use and nobody defined is asked
    for across, by plain data, so the program sees its arguments and never what is expected, nor
    what compares. `entry_point`: what `check(candidate)` is called with, if the tests do not call
    it. Raises like `run_sandboxed`.
    """
    _probe()
    with ExitStack() as stack:
        ask_read, ask_write = _pipe(stack)
        answer_read, answer_write = _pipe(stack)
        program = stack.enter_context(
            _Box("serve", {PROGRAM: code}, ask_read, answer_write, limits)
        )
        long = replace(limits, seconds=3 * limits.seconds)  # tests may be many; the clock is one
        tester = stack.enter_context(
            _Box("check", {TESTS: tests}, answer_read, ask_write, long, entry_point)
        )
        for end in (ask_read, ask_write, answer_read, answer_write):
            end.close()
        if not tester.wait(limits.end()):
            return Outcome("timeout")
        if tester.exit_code is None:
            raise LostError(tester.said())
        if tester.exit_code == UNUSABLE:
            return Outcome("unusable", why=tester.said())
        if tester.exit_code == PASSED:
            return Outcome("ok")
        if program.wait(time.monotonic() + 0.5) and program.exit_code is None:
            raise LostError(program.said())
        return Outcome("error")


def _run(code: str, stdin: str, limits: Limits) -> Outcome:
    with TemporaryFile() as given, TemporaryFile() as out:
        given.write(stdin.encode("utf-8", "replace"))
        given.seek(0)
        with _Box("run", {PROGRAM: code}, given, out, limits) as box:
            in_time = box.wait(limits.end())
            if in_time and box.exit_code is None:
                raise LostError(box.said())
        most = limits.output_kib * 1024
        size = out.seek(0, os.SEEK_END)
        out.seek(0)
        stdout = out.read(most).decode("utf-8", "surrogateescape")
    if not in_time or box.exit_code in _OUT_OF_TIME:
        return Outcome("timeout", stdout)
    if size >= most:
        return Outcome("output", stdout)
    return Outcome("error" if box.exit_code else "ok", stdout)


class _Box:
    """One process under bubblewrap. Leaving the context ends it, and all that it holds."""

    def __init__(
        self,
        role: Literal["run", "serve", "check"],
        files: Mapping[str, str],
        stdin: IO[bytes],
        stdout: IO[bytes],
        limits: Limits,
        *more: str,
    ) -> None:
        self._read, write = os.pipe()
        self._told = b""
        self._noise = TemporaryFile()  # noqa: SIM115 - closed on leaving
        with ExitStack() as stack:
            filter_fd = _data(stack, _filter())
            contents = {
                _data(stack, text.encode("utf-8", "replace")): path for path, text in files.items()
            }
            bound = [w for fd, p in contents.items() for w in ("--ro-bind-data", str(fd), p)]
            command = [
                str(_bwrap()), *_walls(), *bound, "--remount-ro", "/",
                "--seccomp", str(filter_fd), "--json-status-fd", str(write),
                "--", _python(), "-I", "-S", "-B", "-X", "utf8", "-c", _START,
                role, *_numbers(limits), *more,
            ]  # fmt: skip
            try:
                self._process = subprocess.Popen(
                    command,
                    stdin=stdin,
                    stdout=stdout,
                    stderr=self._noise,
                    pass_fds=(filter_fd, write, *contents),
                    env={},
                    cwd="/",
                    start_new_session=True,
                )
            except BaseException:
                os.close(self._read)
                raise
            finally:
                os.close(write)

    def wait(self, until: float) -> bool:
        """Whether it ended by then: bubblewrap holds its status pipe open until its own end."""
        poll = select.poll()
        poll.register(self._read, select.POLLIN)
        while (left := until - time.monotonic()) > 0:
            if poll.poll(left * 1000):
                read = os.read(self._read, 4096)
                if not read:
                    return True
                self._told += read
        return False

    @property
    def exit_code(self) -> int | None:
        """The program's; None if it never began (bubblewrap failed) or has not ended."""
        words = [json.loads(line) for line in self._told.decode().splitlines()]
        return next((word["exit-code"] for word in words if "exit-code" in word), None)

    def said(self) -> str:
        """The last line on standard error."""
        self._noise.seek(0)
        lines = self._noise.read(10_000).decode("utf-8", "replace").strip().splitlines()
        return lines[-1] if lines else "no word"

    def __enter__(self) -> _Box:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()  # what it started dies with it: --die-with-parent
        self._process.wait()
        os.close(self._read)
        self._noise.close()


def _walls() -> Sequence[str]:
    """bubblewrap's arguments: new namespaces of every kind, and of files only what Python needs."""
    prefix = os.path.realpath(sys.base_prefix)
    walls = [
        "--unshare-user", "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts",
        "--unshare-cgroup-try", "--uid", "65534", "--gid", "65534", "--hostname", "sandbox",
        "--cap-drop", "ALL", "--die-with-parent", "--new-session", "--clearenv",
    ]  # fmt: skip
    for place in ("/usr/lib", "/usr/lib64", "/lib", "/lib64"):
        if os.path.islink(place):
            walls += ["--symlink", os.readlink(place), place]
        elif os.path.isdir(place):
            walls += ["--ro-bind", place, place]
    own = _python() if prefix in ("/", "/usr") else prefix
    ours = str(Path(inside.__file__).resolve().parent)
    walls += ["--dev-bind", "/dev/null", "/dev/null"]  # where programs send what they print
    return [*walls, "--ro-bind", own, own, "--ro-bind", ours, _INSIDE, "--chdir", "/"]


def _numbers(limits: Limits) -> list[str]:
    kib = 1024
    return [
        str(math.ceil(limits.seconds)),
        str(limits.memory_mib * kib * kib),
        str(limits.output_kib * kib),
        str(limits.files),
    ]


def _filter() -> bytes:
    """The system-call filter, in classic BPF: another architecture's calls kill, what is denied
    says EPERM, the rest may pass.
    """
    machines = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
    if platform.machine() not in machines:
        raise ConfigError(
            f"There is no sandbox for {platform.machine()}; score code on x86_64 or aarch64."
        )
    column, audit = machines[platform.machine()]
    numbers = [pair[column] for pair in _DENIED.values()]
    load, equal, at_least, answer = 0x20, 0x15, 0x35, 0x06
    allow, deny, kill = 0x7FFF0000, 0x00050001, 0x80000000
    program = [(load, 0, 0, 4), (equal, 1, 0, audit), (answer, 0, 0, kill), (load, 0, 0, 0)]
    # From here on: is it one of x32's (x86_64's second numbering)? one of the denied?
    program += [(at_least, 0, 1, 0x40000000), (answer, 0, 0, kill)]
    for number in numbers:
        if number is not None:
            program += [(equal, 0, 1, number), (answer, 0, 0, deny)]
    program.append((answer, 0, 0, allow))
    return b"".join(struct.pack("=HBBI", *line) for line in program)


def _data(stack: ExitStack, content: bytes) -> int:
    """A descriptor to read `content` from."""
    file = stack.enter_context(TemporaryFile())  # noqa: SIM115
    file.write(content)
    file.seek(0)
    return file.fileno()


def _pipe(stack: ExitStack) -> tuple[IO[bytes], IO[bytes]]:
    read, write = os.pipe()
    return (
        stack.enter_context(os.fdopen(read, "rb", 0)),
        stack.enter_context(os.fdopen(write, "wb", 0)),
    )


def _python() -> str:
    """The interpreter itself, outside any virtual environment."""
    return os.path.realpath(sys.executable)


@cache
def _bwrap() -> Path:
    """bubblewrap, the system's."""
    if found := shutil.which("bwrap"):
        return Path(found)
    raise ConfigError(
        "Rewards that run code need bubblewrap, which keeps the code in; install it: "
        "apt install bubblewrap, or your system's like."
    )


@cache
def _probe() -> None:
    """Raises `ConfigError` if this machine lets no sandbox come up."""
    # Nothing is written inside a sandbox, so each would compile what runs there anew.
    compileall.compile_dir(os.path.dirname(inside.__file__), quiet=2, optimize=0)
    try:
        outcome = _run("print(6 * 7)", "", Limits(seconds=30))
        said = f"it gave {outcome.status}"
    except (LostError, OSError) as error:
        outcome, said = None, str(error)
    if outcome != Outcome("ok", "42\n"):
        raise ConfigError(
            f"The sandbox for code does not start ({said}); bubblewrap needs a Linux that allows"
            " user namespaces (in a container: run it with its own seccomp profile)."
        )
