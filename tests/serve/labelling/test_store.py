"""Every acknowledged label is in the file once, whatever happens to the process."""

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from gearshift.data.labels import Labels, read_events
from gearshift.errors import DataError, FolderInUseError, StorageError
from gearshift.serve.labelling.items import make_item
from gearshift.serve.labelling.store import LabelStore

PROMPT = [{"role": "user", "content": "ask"}]


def label(number: int, item: str, **more: Any) -> dict[str, Any]:
    event = {"id": f"label-{number:06}", "kind": "pair", "item": item, "who": "ann"}
    shown = {"left": 0, "right": 1, "order_seed": 0}
    return {**event, "choice": "left", "shown": shown, "seconds": 2.0, **more}


def opened(folder: Path) -> tuple[LabelStore, str]:
    store = LabelStore(folder, "test")
    item = make_item(PROMPT, ["one", "two"], [{}, {}])
    store.add_item(item)
    return store, item.id


def write_until_killed(folder: Path, first: int, out: int) -> None:
    """Write labels, and the id of each one that is acknowledged into `out`."""
    with LabelStore(folder, "test") as store:
        os.write(out, b"ready\n")
        for number in range(first, first + 100_000):
            item = make_item(PROMPT, [f"answer {number} é\u2028" * 9, "other"], [{}, {}])
            store.add_item(item)
            if store.add(label(number, item.id)):
                os.write(out, f"label-{number:06}\n".encode())


def kill_at_random(folder: Path, kills: int) -> set[str]:
    """The acknowledged labels of writers, each killed at some moment."""
    acknowledged: set[str] = set()
    for i in range(kills):
        read, write = os.pipe()
        if not (child := os.fork()):
            try:
                os.close(read)
                write_until_killed(folder, 1000 * i, write)
            finally:
                os._exit(1)
        os.close(write)
        with os.fdopen(read, "rb") as said:
            assert said.readline() == b"ready\n"
            time.sleep(random.uniform(0.0, 0.03))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            acknowledged |= {line.decode() for line in said.read().split(b"\n")[:-1]}
    return acknowledged


def check_all_there_once(folder: Path, acknowledged: set[str]) -> None:
    assert acknowledged
    with LabelStore(folder, "test") as store:
        events, size = read_events(store.file)
        assert size == store.file.stat().st_size
    ids = [event["id"] for event in events]
    assert acknowledged <= set(ids)
    assert len(ids) == len(set(ids))


def test_t50_every_acknowledged_label_is_there_once_after_kill_9(tmp_path: Path) -> None:
    check_all_there_once(tmp_path, kill_at_random(tmp_path, 20))


@pytest.mark.slow
def test_t50_two_hundred_times(tmp_path: Path) -> None:
    check_all_there_once(tmp_path, kill_at_random(tmp_path, 200))


@pytest.mark.parametrize("seed", range(20))
def test_t50_any_torn_end_is_dropped_and_nothing_before_it(
    tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    store, item = opened(tmp_path)
    for number in range(5):
        store.add(label(number, item, reason={"text": "é\u2028\n", "tags": []}))
    store.close()
    whole = store.file.read_bytes()
    cut = random.Random(seed).randrange(1, len(whole))
    store.file.write_bytes(whole[:cut])
    with LabelStore(tmp_path, "test") as again:
        assert again.file.read_bytes() == whole[: whole[:cut].rfind(b"\n") + 1]
        known = len(again.labels.events)
        again.add(label(99, item))
    assert len(read_events(store.file)[0]) == known + 1
    assert ("never acknowledged" in capsys.readouterr().out) == (whole[cut - 1 : cut] != b"\n")


def test_an_id_that_comes_twice_is_stored_once(tmp_path: Path) -> None:
    store, item = opened(tmp_path)
    assert store.add(label(1, item))
    assert not store.add(label(1, item))
    store.close()
    with LabelStore(tmp_path, "test") as again:
        assert not again.add(label(1, item))
        assert len(read_events(again.file)[0]) == 2


def test_nothing_is_acknowledged_before_it_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, item = opened(tmp_path)
    synced = os.fsync

    def broken(_: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(StorageError, match=r"events\.jsonl"):
        store.add(label(1, item))
    monkeypatch.setattr(os, "fsync", synced)
    assert not store.labels.of(item)
    assert store.add(label(1, item)), "the page sends it again"
    assert store.add(label(2, item, who="bob"))
    store.close()
    ids = [event["id"] for event in read_events(store.file)[0]]
    assert ids[1:] == ["label-000001", "label-000002"]


def test_a_full_disk_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, item = opened(tmp_path)
    write = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: write(handle, data[:10]))
    with pytest.raises(StorageError, match="free some space"):
        store.add(label(1, item))
    monkeypatch.setattr(os, "write", write)
    assert store.add(label(1, item))
    store.close()
    assert len(read_events(store.file)[0]) == 2


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    store, _ = opened(tmp_path)
    with pytest.raises(FolderInUseError, match=r"is labelled by this process .*; stop it first\.$"):
        LabelStore(tmp_path, "test")
    store.close()
    opened(tmp_path)[0].close()


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    store, _ = opened(tmp_path)
    store.close()
    whole = store.file.read_bytes()
    store.file.write_bytes(whole + b"{}\n" + whole)
    with pytest.raises(DataError, match=r"events\.jsonl, line 2 is no event"):
        LabelStore(tmp_path, "test")
    with pytest.raises(DataError):  # the lock was given back, so it is no FolderInUseError
        LabelStore(tmp_path, "test")


def test_undo_keeps_both_entries_and_counts_neither(tmp_path: Path) -> None:
    store, item = opened(tmp_path)
    store.add(label(1, item))
    store.add({"id": "undo-0001", "kind": "undo", "who": "ann", "item": item, "undoes": "x"})
    assert store.labels.of(item), "an undo of nothing"
    undo = {"id": "undo-0002", "kind": "undo", "who": "ann", "item": item}
    store.add({**undo, "undoes": "label-000001"})
    store.close()
    events = read_events(store.file)[0]
    assert len(events) == 4
    assert not Labels(events).of(item)


def test_texts_of_any_kind_come_back(tmp_path: Path) -> None:
    store = LabelStore(tmp_path, "test")
    hostile = "</script>\u202e\x00\ud800\u2028\n" + "x" * 10**5
    item = make_item([{"role": "user", "content": hostile}], [hostile, "b"], [{}, {}])
    store.add_item(item)
    store.close()
    [event] = read_events(store.file)[0]
    assert hostile in event["answers"]
    assert json.loads(store.file.read_bytes())["prompt"][0]["content"] == hostile


def test_the_same_pair_in_another_order_is_the_same_item(tmp_path: Path) -> None:
    store, _ = opened(tmp_path)
    assert not store.add_item(make_item(PROMPT, ["two", "one"], [{}, {}]))
    assert store.add_item(make_item(PROMPT, ["two", "three"], [{}, {}]))
    store.close()
