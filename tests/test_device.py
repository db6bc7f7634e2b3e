"""Tests of the engine, the invariants and the kernels make models and batches on one device."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gearshift.types import Completion
from tests import zoo
from tests.models import families

HERE = Path(__file__).parent
FILES = [f for name in ("engine", "invariants", "kernels") for f in (HERE / name).glob("*.py")]


def test_helpers_make_everything_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEARSHIFT_TEST_DEVICE", "meta")
    said = [[Completion([3, 4], [-1.0, -2.0], [-1.0, -2.0], "stop", [0, 0])]]
    batch = zoo.pack_completions([[5, 6]], said)
    models = (
        zoo.random_model("llama"), zoo.tiny_model(), families.random_model(zoo.CONFIGS["gpt2"])
    )  # fmt: skip
    tensors = [zoo.sampled_logprobs(said), batch.input_ids, batch.loss_mask]
    for x in (*tensors, *(p for model in models for p in model.parameters())):
        assert x.device == torch.device("meta")


def other_places(tree: ast.AST) -> Iterator[str]:
    """What makes a model or a tensor somewhere else than on the device of the tests."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "gearshift.models.tiny":
            yield from (a.name for a in node.names if a.name == "tiny_model")
        if isinstance(node, ast.Constant) and node.value == "GEARSHIFT_TEST_DEVICE":
            yield str(node.value)
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func)
        keys = {key.arg: ast.unparse(key.value) for key in node.keywords}
        moves = name == "to" and any(ast.unparse(a).startswith("'cuda") for a in node.args)
        if name == "cuda" or moves or keys.get("device", "").startswith("'cuda"):
            yield ast.unparse(node)
        if name == "ModelConfig" and "device" not in keys:
            yield ast.unparse(node)


@pytest.mark.parametrize("file", FILES, ids=lambda f: f"{f.parent.name}/{f.stem}")
def test_no_test_makes_its_models_elsewhere(file: Path) -> None:
    assert list(other_places(ast.parse(file.read_text(encoding="utf-8")))) == []


@pytest.mark.parametrize(
    "line",
    [
        "from gearshift.models.tiny import tiny_model", "x.to('cuda:1')", "x.cuda()",
        "torch.zeros(1, device='cuda')", "ModelConfig(dtype='float32')",
        "os.environ.get('GEARSHIFT_TEST_DEVICE')",
    ],
)  # fmt: skip
def test_other_places_are_found(line: str) -> None:
    assert len(list(other_places(ast.parse(line)))) == 1
