"""Notes of what each rank does, and what `gearshift doctor --run` makes of them."""

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from gearshift.cli.main import main
from gearshift.errors import DataError
from gearshift.runtime.folder_lock import lock_run_folder, process_start
from gearshift.runtime.ranks import RankNote, find_missing, read_ranks


def note(folder: Path, rank: int, ranks: int = 3, **others: Any) -> None:
    """A note of a rank of this process."""
    pid = os.getpid()
    base = {
        "rank": rank, "ranks": ranks, "host": socket.gethostname(), "pid": pid,
        "started": process_start(pid), "meetings": 7, "waits_for": None, "last": "episodes",
        "since": time.time() - 40, "ended": None,
    }  # fmt: skip
    (folder / "ranks").mkdir(parents=True, exist_ok=True)
    (folder / "ranks" / f"{rank}.json").write_text(json.dumps({**base, **others}))


def printed(folder: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    main(["doctor", "--run", str(folder)])
    return capsys.readouterr().out.splitlines()


def test_the_doctor_names_the_rank_that_others_wait_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank in (0, 2):
        note(tmp_path, rank, waits_for="rewards")
    note(tmp_path, 1)
    with lock_run_folder(tmp_path):
        lines = printed(tmp_path, capsys)
    me = f"on {socket.gethostname()} (process {os.getpid()})"
    assert lines == [
        f"rank 0 {me} has waited for rewards for 40 s; 7 meetings",
        f"rank 1 {me} has worked for 40 s, since episodes; 7 meetings",
        f"rank 2 {me} has waited for rewards for 40 s; 7 meetings",
        "ranks 0, 2 wait for rank 1, at rewards",
    ]


def test_the_doctor_sees_a_rank_that_does_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    note(tmp_path, 0, waits_for="rewards")
    note(tmp_path, 1, started="long ago")
    with lock_run_folder(tmp_path):
        lines = printed(tmp_path, capsys)
    assert "does not run any more" in lines[1]
    assert lines[-1] == "ranks 1, 2 of 3 do not run"


@pytest.mark.parametrize(
    ("waiting", "line"),
    [(0, "no rank waits for another one"), (3, "all ranks are at one meeting")],
)
def test_the_doctor_says_that_no_rank_is_late(
    waiting: int, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank in range(3):
        note(tmp_path, rank, waits_for="rewards" if rank < waiting else None)
    with lock_run_folder(tmp_path):
        assert printed(tmp_path, capsys)[-1] == line


def test_the_doctor_knows_a_run_in_one_process(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    note(tmp_path, 0, pid=1)  # an earlier run, of several ranks
    with lock_run_folder(tmp_path):
        (line,) = printed(tmp_path, capsys)
    assert line.startswith("one process: this process since ")


def test_the_doctor_finds_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(tmp_path, capsys) == [f"no run goes on in {tmp_path}"]
    with pytest.raises(SystemExit):
        main(["doctor", "--run", str(tmp_path / "none")])
    assert "none does not exist; name a run's folder." in capsys.readouterr().err


def test_a_clean_end_leaves_no_note(tmp_path: Path) -> None:
    note(tmp_path, 5)  # of an earlier run with more ranks
    with RankNote(tmp_path, 0, 2) as mine:
        mine.waits("rewards")
    assert not (tmp_path / "ranks").exists()


def test_an_error_that_others_do_not_know_is_left_for_them(tmp_path: Path) -> None:
    with pytest.raises(DataError), RankNote(tmp_path, 1, 2):
        raise DataError("row 3 is odd.")
    (left,) = read_ranks(tmp_path / "ranks")
    assert left["ended"] == "row 3 is odd."
    found = find_missing(tmp_path / "ranks", 2, late=False)
    assert found[1].endswith("ended: row 3 is odd.")


def test_one_that_all_know_is_not(tmp_path: Path) -> None:
    error: Any = DataError("row 3 is odd.")
    error.known_to_all = True
    with pytest.raises(DataError), RankNote(tmp_path, 1, 2):
        raise error
    assert not (tmp_path / "ranks").exists()


def test_of_a_timeout_the_rank_that_works_is_missing(tmp_path: Path) -> None:
    note(tmp_path, 0, waits_for="rewards")
    note(tmp_path, 1)
    assert list(find_missing(tmp_path / "ranks", 2, late=True)) == [1]


def test_notes_of_another_machine_are_judged_by_their_age(tmp_path: Path) -> None:
    note(tmp_path, 0, waits_for="rewards")
    note(tmp_path, 1, host="elsewhere", waits_for="rewards")
    assert find_missing(tmp_path / "ranks", 2, late=True) == {}
    path = tmp_path / "ranks" / "1.json"
    os.utime(path, (time.time() - 100, time.time() - 100))
    assert list(find_missing(tmp_path / "ranks", 2, late=False)) == [1]


def test_a_damaged_note_is_passed_over(tmp_path: Path) -> None:
    note(tmp_path, 0)
    (tmp_path / "ranks" / "1.json").write_text("{")
    assert [each["rank"] for each in read_ranks(tmp_path / "ranks")] == [0]
