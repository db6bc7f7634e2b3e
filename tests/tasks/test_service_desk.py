"""The orders beside the chat: those that the conversation names, after the agent's calls."""

from pathlib import Path

import pytest

from gearshift.errors import DataError
from gearshift.tasks.rows import read_rows
from gearshift.tasks.service.desk import shop_state
from gearshift.tasks.service.shop import tool_line
from gearshift.tasks.service.task import ServiceConfig, prepare

CONFIG = ServiceConfig(labelled=1, train=1, validation=4, test=1)


def test_calls_change_the_orders_that_are_named(tmp_path: Path) -> None:
    prepare(CONFIG, 0, tmp_path / "data")
    row = read_rows(tmp_path / "data/validation.jsonl", "order")[0]
    number = row["order"]["number"]

    def after(*texts: str) -> dict[str, object]:
        messages = [{"role": "system", "content": f"not {number}"}]
        messages += [{"role": "assistant", "content": text} for text in texts]
        return shop_state(CONFIG, tmp_path, messages)

    first = after()
    assert (first["orders"], first["answer"], len(first["customers"])) == ([], None, 3)  # type: ignore[arg-type]
    done = after(tool_line("refund", number))
    assert done["orders"] == [
        {**row["order"], "state": "refunded", "text": done["orders"][0]["text"]}
    ]  # type: ignore[index]
    assert done["answer"] == "Done."
    assert after(tool_line("get", "X"))["answer"] == "Error: no order found with this number."
    told = after(tool_line("refund", number), f"Order {number} is refunded.")
    assert told["answer"] is None and told["orders"] == done["orders"]
    assert after()["orders"] == []


def test_a_run_without_data_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="prepare the task's data first"):
        shop_state(CONFIG, tmp_path, [])
