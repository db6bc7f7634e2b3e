"""A hub that cannot be reached is asked once, and what needs it is an error at once."""

from __future__ import annotations

import time

import pytest
from huggingface_hub import constants

from gearshift.data import load_rows
from gearshift.errors import DataError, ModelError
from gearshift.models.load import ModelConfig, load_config
from gearshift.runtime.hub import hub_is_reachable


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub at a port that nothing listens on."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")


def test_nothing_waits_for_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)  # between two attempts of the library
    assert not hub_is_reachable()
    with pytest.raises(ModelError, match="owner/model"):
        load_config(ModelConfig(name="owner/model"))
    with pytest.raises(DataError, match="owner/rows"):
        load_rows("owner/rows")
    assert not waits


@pytest.mark.parametrize(("name", "meant"), [("embeded", "embedded"), ("mini-lm", "minilm")])
def test_a_misspelt_name_of_a_shipped_model_is_not_looked_for(name: str, meant: str) -> None:
    with pytest.raises(ModelError, match=f"There is no model '{name}'; did you mean {meant}"):
        load_config(ModelConfig(name=name))
