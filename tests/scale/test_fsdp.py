"""`scale.strategy: fsdp`: what is trained is split over the ranks, and one process's run comes out.
The checks are in `sharded.py`.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from gearshift.errors import ConfigError
from gearshift.pipeline.recipe import Recipe
from gearshift.runtime.config import load
from tests.scale.sharded import QUICK, REST
from tests.scale.split_only import CHECKS

ROOT = Path(__file__).parents[2]
SMOKE = ROOT / "tests" / "smoke" / "tiny.yaml"


def same(folder: Path, ranks: int, *names: str) -> str:
    """What the program prints of these checks."""
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone",
            f"--nproc-per-node={ranks}", "-m", "tests.scale.sharded", str(folder), *names,
        ],
        cwd=ROOT, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    return done.stdout + ("" if done.returncode == 0 else done.stderr[-20000:])


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> str:
    return same(tmp_path_factory.mktemp("ranks"), 2, *QUICK)


@pytest.mark.parametrize("name", QUICK)
def test_two_ranks_do_what_one_process_does(name: str, printed: str) -> None:
    assert f"{name}: same\n" in printed, printed


def test_two_ranks_without_the_whole_model_do_what_one_process_does(tmp_path: Path) -> None:
    names = ("split only: untied", "split only: rl")
    printed = same(tmp_path, 2, *names)
    assert printed.count(": same\n") == len(names), printed


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_without_the_whole_model(ranks: int, tmp_path: Path) -> None:
    # The gradient of phi's key bias is 0 but for rounding, of which Adam makes whole steps.
    names = [name for name in CHECKS if ranks == 2 or "phi" not in name]
    printed = same(tmp_path, ranks, *names)
    assert printed.count(": same\n") == len(names), printed


@pytest.mark.slow
def test_every_family_and_value_net(tmp_path: Path) -> None:
    names = [name for name in REST if name not in ("two nodes", "one rank fails")]
    printed = same(tmp_path, 2, *names)
    assert printed.count(": same\n") == len(names), printed


@pytest.mark.slow
def test_four_ranks_and_two_nodes(tmp_path: Path) -> None:
    names = ("two nodes", "llama", "untied", "sft", "rl", "critic")
    printed = same(tmp_path, 4, *names)
    assert printed.count(": same\n") == len(names), printed


@pytest.mark.slow
def test_a_rank_that_fails_in_a_micro_batch_ends_and_so_do_the_others(tmp_path: Path) -> None:
    printed = same(tmp_path, 2, "one rank fails")
    assert "DataError: the row is broken" in printed and "same" not in printed.splitlines()


@pytest.mark.parametrize(
    "key", ["sft.optimizer.moments=8bit", "rl.update.optimizer.offload=while_generating"]
)
def test_what_the_split_optimizer_lacks_is_refused_with_the_recipe(key: str) -> None:
    load(Recipe, SMOKE, [key])
    with pytest.raises(ConfigError, match=r"scale\.strategy=fsdp") as refused:
        load(Recipe, SMOKE, [key, "scale.strategy=fsdp"])
    assert key.split("=")[0].rpartition(".")[0] in str(refused.value)
