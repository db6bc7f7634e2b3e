"""A signal ends what runs at the next safe point, the second at once; nothing is broken midway."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from gearshift.errors import ConfigError, InterruptedRunError
from gearshift.runtime.interrupt import SIGNALS, Interrupt, Stopped, doing, shielded


@pytest.fixture(autouse=True)
def own_handlers() -> Iterator[list[int]]:
    """Handlers that note what comes; they are there again after an `Interrupt`."""
    caught: list[int] = []
    before = {n: signal.signal(n, lambda n, _: caught.append(n)) for n in SIGNALS}
    yield caught
    for number, handler in before.items():
        signal.signal(number, handler)


def ask(number: int = signal.SIGTERM) -> None:
    signal.raise_signal(number)


@pytest.mark.parametrize("number", SIGNALS)
def test_it_ends_at_once_where_nothing_is_to_be_finished(
    number: int, own_handlers: list[int]
) -> None:
    with (
        pytest.raises(InterruptedRunError, match="Stopped while saving sft; the same") as stopped,
        Interrupt(),
        doing("while preparing sft"),
        doing("while saving sft"),
    ):
        ask(number)
        pytest.fail("it went on")
    assert stopped.value.signal == number and not own_handlers
    ask(number)
    assert own_handlers == [number], "the handlers are those of before"


def test_in_a_step_the_first_asks_and_the_second_acts() -> None:
    with pytest.raises(InterruptedRunError), Interrupt() as interrupt, interrupt.between_steps():
        ask()
        assert interrupt.requested
        with pytest.raises(Stopped):
            ask(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL, "the third kills"
        raise Stopped


def test_a_terminal_that_closes_sends_two_and_means_one() -> None:
    with pytest.raises(InterruptedRunError), Interrupt() as interrupt, interrupt.between_steps():
        ask(signal.SIGHUP)
        ask(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is not signal.SIG_DFL
        interrupt.check()


def test_what_a_loop_did_not_look_at_is_told_when_it_ends() -> None:
    done = []
    with pytest.raises(InterruptedRunError), Interrupt() as interrupt:
        with interrupt.between_steps():
            ask()
            done.append("the loop")
        interrupt.check()
        done.append("after")
    assert done == ["the loop"]


def test_what_is_held_comes_to_its_end() -> None:
    done = []
    with pytest.raises(InterruptedRunError), Interrupt():
        with shielded():
            ask()
            ask()
            done.append("inside")
        done.append("after")
    assert done == ["inside"]


def test_a_signal_in_a_finalizer_is_not_lost(capfd: pytest.CaptureFixture[str]) -> None:
    class Dies:
        def __del__(self) -> None:
            ask()

    steps = []
    with pytest.raises(InterruptedRunError), Interrupt():
        dies = Dies()
        del dies
        steps.append("python dropped the exception")
        with shielded():
            steps.append("in a step")
        steps.append("too late")
    assert steps == ["python dropped the exception", "in a step"]
    assert "Traceback" not in capfd.readouterr().err


def test_code_that_passes_over_errors_does_not_pass_over_it() -> None:
    with pytest.raises(InterruptedRunError), Interrupt():
        try:
            ask()
        except Exception:
            pytest.fail("a library took it for its own error")
    with pytest.raises(InterruptedRunError), Interrupt():
        try:
            ask()
        except BaseException as error:
            raise ConfigError("the model could not be loaded") from error


def test_one_inside_another_is_the_other() -> None:
    with pytest.raises(InterruptedRunError), Interrupt() as outer:
        with Interrupt() as inner:
            assert inner is outer
        ask()
    with Interrupt() as again:
        assert not again.requested


def test_an_error_of_its_own_stays_itself() -> None:
    with (
        pytest.raises(ConfigError),
        Interrupt() as interrupt,
        interrupt.between_steps(),
    ):
        ask()
        raise ConfigError("wrong")


def test_what_was_ignored_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Interrupt() as interrupt:
        ask(signal.SIGHUP)
        assert not interrupt.requested


def test_it_leaves_other_threads_alone() -> None:
    handlers: list[Any] = []

    def work() -> None:
        with (
            Interrupt() as interrupt,
            interrupt.between_steps(),
            interrupt.shielded(),
            doing("x"),
            shielded(),
        ):
            handlers.append(signal.getsignal(signal.SIGTERM))
            assert not interrupt.requested

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert handlers == [before]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forked children here")
def test_a_forked_child_ends_as_if_there_were_no_handler() -> None:
    program = (
        "import os, signal, sys, time\n"
        "from gearshift.runtime.interrupt import Interrupt\n"
        "with Interrupt():\n"
        "    begun, tell = os.pipe()\n"
        "    child = os.fork()\n"
        "    if not child:\n"
        "        os.write(tell, b'.')\n"
        "        time.sleep(60)\n"
        "    os.read(begun, 1)\n"
        "    os.kill(child, signal.SIGTERM)\n"
        "    print(os.waitpid(child, 0)[1])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == str(int(signal.SIGTERM)), done.stderr
