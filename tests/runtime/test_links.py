"""What a preflight of several machines finds bad."""

from dataclasses import replace

import pytest

from gearshift.cli.main import main
from gearshift.runtime import links
from gearshift.runtime.links import Link, Machine

GOOD = Machine(
    "a", {"python": "3.11.7", "torch": "2.13.0"}, 8, {"memory": 2.0**33, "/tmp": 2.0**34}
)


def test_one_rank_with_another_version_is_named() -> None:
    other = replace(GOOD, host="b", versions={"python": "3.11.7", "torch": "2.9.0"})
    assert links._versions([GOOD, other, GOOD]) == [
        "rank 1 on b has torch 2.9.0, and others have 2.13.0"
    ]
    assert links._versions([GOOD, GOOD]) == []


def test_a_clock_that_is_off_is_named() -> None:
    assert links._clocks([0.0, 0.3, -2.5]) == ["the clock of rank 2 is off by -2.5 s"]
    assert links._clocks([0.0, 3.0, 3.1]) == ["the clock of rank 0 is off by -3.0 s"]


def test_a_full_disk_and_no_memory_are_named() -> None:
    full = replace(GOOD, free={"memory": 2.0**33, "/tmp": 2.0**20})
    assert links._space([GOOD, full]) == ["rank 1 on a has 0.0 GiB of /tmp free"]
    empty = replace(GOOD, free={"memory": 2.0**29})
    assert links._space([empty]) == ["rank 0 on a has 0.5 GiB of memory free"]


def test_a_link_is_compared_with_those_of_its_kind() -> None:
    fast = [Link((0, i), "one machine, cpu", 2.0**30, 1e-4) for i in range(1, 4)]
    between = [Link((i, 4), "two machines, cpu", 2.0**27, 1e-3) for i in range(4)]
    assert links._slow([*fast, *between]) == []
    slow = Link((2, 5), "two machines, cpu", 2.0**23, 1e-3)
    (line,) = links._slow([*fast, *between, slow])
    assert line.startswith("rank 2 - rank 5 (two machines, cpu): 8 MiB/s") and "128 MiB/s" in line
    late = Link((2, 5), "two machines, cpu", 2.0**27, 1e-1)
    assert len(links._slow([*fast, *between, late])) == 1


def test_the_doctor_says_how_links_are_measured(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["doctor", "--links"])
    assert exit.value.code == 1
    assert "torchrun --standalone --nproc-per-node=2 -m gearshift doctor --links." in (
        capsys.readouterr().err
    )
