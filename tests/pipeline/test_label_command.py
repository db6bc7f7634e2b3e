"""The command `label`: what it refuses, and its exports."""

import json
from pathlib import Path

import pytest

from gearshift.cli.main import main
from gearshift.serve.labelling.items import make_item
from gearshift.serve.labelling.store import LabelStore


def labelled(rows: Path) -> None:
    rows.write_text('{"prompt": "a"}\n')
    with LabelStore(rows.with_name(f"{rows.name}.labels"), "test") as store:
        asked = [{"role": "user", "content": "a"}]
        item = make_item(asked, ["b", "c\ud800"], [{}, {}])
        store.add_item(item)
        shown = {"left": 1, "right": 0, "order_seed": 0}
        event = {"kind": "pair", "item": item.id, "shown": shown, "seconds": 1.0}
        store.add({**event, "id": "label-0001", "who": "ann", "choice": "left"})
        store.add({**event, "id": "label-0002", "who": "bob", "choice": "tie"})


def test_an_export_is_a_file_of_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, out = tmp_path / "rows.jsonl", tmp_path / "pairs.jsonl"
    labelled(rows)
    main(["label", str(rows), "--export", str(out)])
    assert out.read_text() == "", "one for a tie, one against"
    assert "0 rows of 1 item written" in capsys.readouterr().out
    main(["label", str(rows), "--export", str(out), "--by", "ann"])
    assert json.loads(out.read_text())["labellers"] == ["ann"]
    main(["label", str(rows), "--export", str(out), "--by", "bob", "--ties", "--format", "judged"])
    assert [json.loads(line)["label"] for line in out.read_text().splitlines()] == [True, True]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["none.jsonl"], "There is no run and no file none.jsonl; check the path."),
        (["p.jsonl"], "p.jsonl has prompts without answers; name a policy with --against."),
        (["p.jsonl", "--overlap", "20"], "--overlap is 20.0; give a share from 0 to 1."),
        (["p.jsonl", "--export", "x.jsonl"], "cannot be read"),
        (["p.jsonl", "--gold", "none.jsonl", "--against", "tiny"], "none.jsonl does not exist"),
    ],
)
def test_what_cannot_be_labelled_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    reason: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("p.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(SystemExit) as ended:
        main(["label", *words])
    assert ended.value.code == 1
    error = capsys.readouterr().err
    assert reason in error and len(error.strip().splitlines()) == 1
