"""What one rank raises ends all ranks with one message, and nothing hangs: two ranks, no model."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gearshift.errors import DataError, RankError
from gearshift.runtime import exit_errors


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each rank of each case of `worlds.py` came to."""
    folder = tmp_path_factory.mktemp("worlds")
    done = subprocess.run(
        [sys.executable, "-m", "tests.runtime.worlds", folder],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "a rank printed something of its own"
    return json.loads(done.stdout)


def test_a_disk_that_refuses_notes_ends_no_run(ends: dict[str, Any]) -> None:
    assert ends["fine"]["came_to"] == [[[3.0] * 3, [0.0, 2.0]], [[3.0] * 3, [4.0, 6.0]]]


ODD = ["DataError", "row 3 is odd; correct it.", 1, True]


@pytest.mark.parametrize("case", ["alone_in_a_sum", "after_the_last_meeting"])
def test_an_error_of_one_rank_is_raised_on_all(case: str, ends: dict[str, Any]) -> None:
    """Also while the others are in a collective on tensors, which the failed rank must not join."""
    assert ends[case] == {"came_to": [ODD, ODD], "notes": []}


def test_an_error_before_the_ranks_meet_is_raised_on_all(ends: dict[str, Any]) -> None:
    expected = ["ConfigError", "recipe.yaml does not exist; name another.", 1, True]
    assert ends["in_time"]["came_to"] == [expected, expected]


def test_of_two_errors_the_main_ranks_one_is_printed(ends: dict[str, Any]) -> None:
    main, other = ends["both"]["came_to"]
    assert main == ["DataError", "row 3 is odd.", 1, True]
    assert other == ["NumericalError", "the loss is not finite.", 1, True]


def test_an_unexpected_error_of_a_rank_keeps_its_traceback(ends: dict[str, Any]) -> None:
    (kind, line, code, _), other = ends["unexpected"]["came_to"]
    assert (kind, code, other[0]) == ("RankError", exit_errors.UNEXPECTED_ERROR, "KeyError")
    assert line.startswith("Rank 1: Unexpected error: KeyError: 'lost' (the traceback is in ")


def test_an_error_in_other_words_is_still_known_to_all(ends: dict[str, Any]) -> None:
    words = ["DataError", "a stage says it in other words.", 1, True]
    assert ends["in_other_words"] == {"came_to": [words, words], "notes": []}


def test_a_signal_to_one_rank_stops_all(ends: dict[str, Any]) -> None:
    assert [each[0] for each in ends["signalled"]["came_to"]] == ["Stopped", "Stopped"]


@pytest.mark.parametrize(
    ("case", "who", "what"),
    [
        ("gone", "Rank 1 on ", "the others waited 0 s for it at rewards;"),
        ("main_gone", "Rank 0 on ", "the others waited 0 s for it at weights;"),
        ("hangs", "Rank 1 on ", "the others waited 2 s (scale.timeout) for it at rewards;"),
    ],
)
def test_the_rank_that_did_not_come_is_named(
    case: str, who: str, what: str, ends: dict[str, Any]
) -> None:
    ((kind, line, _, known),) = ends[case]["came_to"]
    assert kind == "RankError" and line.startswith(who) and what in line and not known
    words = "has worked for 2 s, since the first" if case == "hangs" else "does not run any more"
    assert words in line


def test_links_and_machines_are_measured(ends: dict[str, Any]) -> None:
    (lines, faults), other = ends["links"]["came_to"]
    assert [lines, faults] == other
    for rank in (0, 1):
        assert lines[rank].startswith(f"rank {rank} on ") and "clock " in lines[rank]
    assert lines[2].startswith("rank 0 - rank 1 (one machine, cpu): ") and len(lines) == 3
    assert "has torch" not in faults and "clock" not in faults


def test_ranks_that_meet_for_different_things_end(ends: dict[str, Any]) -> None:
    (_, line, _, known), other = ends["other_program"]["came_to"]
    assert "(rank 0: a sum; rank 1: rewards)" in line and not known
    assert other[3], "one line is enough"


@pytest.mark.parametrize(
    ("rank", "known", "printed"),
    [
        ("0", False, "gearshift: no row.\n"),
        ("0", True, "gearshift: no row.\n"),
        ("1", True, ""),
        ("1", False, "gearshift: rank 1: no row.\n"),
    ],
)
def test_one_rank_prints_the_line(
    rank: str, known: bool, printed: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    error: Any = DataError("no row.")
    error.known_to_all = known
    with pytest.raises(SystemExit) as exit:
        exit_errors.exit_with_error(error, None, alone=False)
    assert exit.value.code == 1 and capsys.readouterr().err == printed
    if printed:  # torchrun's report has the line in place of an address
        reported = json.loads((tmp_path / "error.json").read_text())["message"]
        assert f"gearshift: {reported}\n" == printed


def test_the_exit_code_of_another_rank_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    error: Any = RankError("Rank 1: Unexpected error: KeyError.")
    error.exit_code = 70
    with pytest.raises(SystemExit) as exit:
        exit_errors.exit_with_error(error, None, alone=False)
    assert exit.value.code == 70


def test_a_process_alone_is_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert exit_errors.rank_of_process() == 0 and os.environ["RANK"] == "3"
