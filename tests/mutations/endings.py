"""How a run ends: signals, failed writes, memory, and what is left for the command line."""

from tests.mutations import Mutation

MUTATIONS = (
    Mutation(
        "a second signal in a step is passed over",
        "runtime/interrupt.py",
        "        if self._patient and not again:",
        "        if self._patient:",
        "tests/runtime/test_interrupt.py",
    ),
    Mutation(
        "a signal ends what is held",
        "runtime/interrupt.py",
        "        if self._held or self._raised:",
        "        if self._raised:",
        "tests/runtime/test_interrupt.py",
    ),
    Mutation(
        "a signal that was ignored is not any more",
        "runtime/interrupt.py",
        "not in (signal.SIG_IGN, None)",
        "not in (None,)",
        "tests/runtime/test_interrupt.py",
    ),
    Mutation(
        "a signal in the last step is passed over",
        "trainers/stage.py",
        "                asked = self._asked(interrupt)",
        "                asked = self._asked(interrupt) and step + 1 < self.total",
        "tests/trainers/test_resume.py::test_a_signal_in_the_last_step_ends_the_stage",
    ),
    Mutation(
        "half an update is saved",
        "trainers/stage.py",
        "if mark and mark.step and mark.updates == self._updates():",
        "if mark and mark.step:",
        "tests/trainers/test_resume.py::test_what_ends_a_step_in_the_middle_loses_no_finished_one",
    ),
    Mutation(
        "averages of an unfinished step are saved",
        "trainers/stage.py",
        "{**states, **(small or {})}",
        "states",
        "tests/trainers/test_resume.py::test_what_ends_a_step_in_the_middle_loses_no_finished_one",
    ),
    Mutation(
        "an error that was not foreseen keeps no traceback",
        "runtime/exit_errors.py",
        "            path.write_text(text, encoding",
        "            str(path), dict(encoding",
        "tests/runtime/test_exit_errors.py",
    ),
    Mutation(
        "a lack of memory is an error that was not foreseen",
        "runtime/exit_errors.py",
        "if reason := short_of_memory(error):",
        "if reason := '':",
        "tests/runtime/test_exit_errors.py",
    ),
    Mutation(
        "output that is lost ends the run",
        "runtime/terminal.py",
        "        silence(self._stream)\n        reason",
        "        raise error\n        reason",
        "tests/runtime/test_exit_errors.py",
    ),
    Mutation(
        "a tracker that fails ends the run",
        "runtime/metrics.py",
        "                self.lost[name] = 1",
        "                raise",
        "tests/runtime/test_metrics.py",
    ),
    Mutation(
        "a control group's cache counts as held",
        "runtime/free_memory.py",
        "float(most) - used + int(held.get(cache, 0))",
        "float(most) - used",
        "tests/pipeline/test_memory.py",
    ),
    Mutation(
        "the control groups above do not count",
        "runtime/free_memory.py",
        "for group in (here, *here.parents, top):",
        "for group in (here,):",
        "tests/pipeline/test_memory.py",
    ),
)
