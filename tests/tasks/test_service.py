"""Customer service: what counts as a solved problem, and what held out means."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gymnasium.utils.env_checker import check_env
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizerFast,
)

from gearshift.data import render_completion
from gearshift.errors import DataError
from gearshift.models.load import ModelConfig, load_classifier, load_tokenizer, save_model
from gearshift.rewards.models import ModelReward
from gearshift.tasks.service import customers as c
from gearshift.tasks.service import environment as e
from gearshift.tasks.service import replies as r
from gearshift.tasks.service import task as s
from gearshift.tasks.service.reply_judge import judge
from gearshift.tasks.service.shop import (
    Case,
    Order,
    Outcome,
    Wish,
    outcome_text,
    states_facts,
    to_row,
    tool_line,
)

SMALL = s.ServiceConfig(labelled=12, train=80, validation=60, test=48)
SMALL_REPLIES = r.RepliesConfig(
    labelled=8,
    dialogues=10,
    train=80,
    validation=60,
    test=48,
    pairs=80,
    talk_pairs=20,
    pairs_heldout=40,
)
Files = dict[str, list[dict[str, Any]]]
KETTLE = Order("A123", "red kettle", 40, "delivered", 12, "3 Mill Lane")
LAMP = replace(KETTLE, number="B456", item="blue lamp")


def load(paths: dict[str, Path]) -> Files:
    return {n: [json.loads(x) for x in p.read_text().splitlines()] for n, p in paths.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("service")


@pytest.fixture(scope="module")
def files(folder: Path) -> Files:
    return load(s.prepare(SMALL, 3, folder))


@pytest.fixture(scope="module")
def replies(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return load(r.prepare(SMALL_REPLIES, 3, tmp_path_factory.mktemp("replies")))


def begin(case: Case, **script: Any) -> e.CustomerServiceEnvironment:
    """An episode with the customer of this case, who gives the order number if `given`."""
    said = c.Script(
        **{"problem": "Help!", "number": "A123.", "given": True, "yes": "Yes.", **script}
    )
    row = {
        "order": to_row(case.order),
        "wish": case.wish,
        "address": case.address,
        "others": [to_row(LAMP)],
        "script": {name: getattr(said, name) for name in c.Script.__slots__},
    }
    environment = e.CustomerServiceEnvironment.of([row])
    environment.reset(options={"row": 0})
    return environment


def play(environment: e.CustomerServiceEnvironment, *turns: str) -> tuple[float, bool, list[str]]:
    """What the turns earn, whether the problem was solved at an end, and what was answered."""
    total, heard, over, success = 0.0, [], False, False
    for turn in turns:
        assert not over, f"the episode was over before {turn!r}"
        observation, reward, ended, cut, info = environment.step(turn)
        total, over, success = total + reward, ended or cut, info["success"]
        heard.append(observation)
    return total, over and success, heard


GET = '{"tool": "get", "order": "A123"}'
REFUND = '{"tool": "refund", "order": "A123"}'
TOLD = "Your red kettle is refunded: 40 euros."
CASE = Case(KETTLE, "refund")


# The policy and the judge


@pytest.mark.parametrize(
    ("order", "wish", "outcome"),
    [
        (KETTLE, "track", "tell"),
        (KETTLE, "refund", "refund"),
        (replace(KETTLE, days=30, price=100), "refund", "refund"),
        (replace(KETTLE, days=31), "refund", "refuse"),
        (replace(KETTLE, price=101), "refund", "handover"),
        (replace(KETTLE, status="shipped"), "refund", "refuse"),
        (KETTLE, "cancel", "refuse"),
        (replace(KETTLE, status="packing"), "cancel", "cancel"),
        (replace(KETTLE, status="shipped"), "address", "refuse"),
        (replace(KETTLE, status="packing"), "address", "address"),
    ],
)
def test_policy(order: Order, wish: Wish, outcome: Outcome) -> None:
    case = Case(order, wish, "9 Oak Road" if wish == "address" else "")
    assert case.outcome == outcome
    assert states_facts(outcome_text(case), case)
    assert (case.goal != order) == (outcome in ("refund", "handover", "cancel", "address"))


@pytest.mark.parametrize(
    "text",
    [
        "Sorry, I cannot refund it: more than 30 days have passed.",
        "Your red kettle is refunded: 45 euros.",
        "Your red kettle is refunded.",
        "Your red kettle is cancelled, 40 euros.",
        "Your red kettle is refunded and cancelled: 40 euros.",
        "Your red kettle is refunded: 40 euros, at 5 o'clock.",
        "",
    ],
)
def test_wrong_words_do_not_tell_the_outcome(text: str) -> None:
    assert states_facts(TOLD, CASE) and not states_facts(text, CASE)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_the_expert_solves_every_problem_and_earns_one(
    folder: Path, files: Files, split: str
) -> None:
    environment = e.CustomerServiceEnvironment(folder / f"{split}.jsonl")
    for i in range(len(files[split])):
        environment.reset(options={"row": i})
        turns = c.expert_turns(environment.case, environment.script)
        assert len(turns) <= 5
        total, solved, _ = play(environment, *turns)
        assert solved and total == pytest.approx(1.0), files[split][i]


def test_refusing_everybody_or_granting_everything_solves_few_problems(folder: Path) -> None:
    def solved(turns: Callable[[e.CustomerServiceEnvironment], list[str]]) -> float:
        environment = e.CustomerServiceEnvironment(folder / "train.jsonl")
        done = 0
        for i in range(len(environment.rows)):
            environment.reset(options={"row": i})
            for turn in turns(environment):
                _, _, ended, cut, info = environment.step(turn)
                if ended or cut:
                    done += info["success"]
                    break
        return done / len(environment.rows)

    def refuse(e: e.CustomerServiceEnvironment) -> list[str]:
        said = "Sorry, I cannot: it is delivered or shipped, or 30 days have passed."
        return [tool_line("get", e.case.order.number), said, said]

    def grant(e: e.CustomerServiceEnvironment) -> list[str]:
        tool = "refund" if e.case.wish == "track" else e.case.wish
        act = tool_line(tool, e.case.order.number, e.case.address)
        return [
            tool_line("get", e.case.order.number),
            act,
            "It is done: refund, cancel, address.",
        ]

    assert solved(refuse) < 0.5
    assert solved(grant) < 0.3


# The conversation


def test_a_solved_problem() -> None:
    environment = begin(CASE, given=False)
    total, solved, heard = play(environment, c.ASK, GET, REFUND, TOLD)
    assert (total, solved) == (pytest.approx(1.0), True)
    assert heard == ["A123.", "red kettle, 40 euros, delivered 12 days ago", "Done.", ""]


def test_looking_twice_or_at_others_orders_earns_nothing() -> None:
    total, _, _ = play(begin(CASE), GET, GET, '{"tool": "get", "order": "B456"}')
    assert total == pytest.approx(e.LOOKUP + 2 * e.WASTE)


def test_a_tools_answer_has_the_role_tool() -> None:
    info = begin(CASE).step(GET)[-1]
    assert [m["role"] for m in info["messages"]] == ["tool"]


@pytest.mark.parametrize(
    ("turns", "harm"),
    [
        ((GET, '{"tool": "cancel", "order": "A123"}'), True),
        ((GET, '{"tool": "refund", "order": "B456"}'), True),
        ((GET, '{"tool": "handover", "order": "A123"}'), True),
        ((GET, REFUND, REFUND), True),
        ((GET, TOLD), False),
        ((GET, REFUND, "Your refund is on its way."), False),
        ((REFUND, TOLD, TOLD), False),
    ],
)
def test_what_the_policy_forbids_or_the_customer_is_not_told_is_no_success(
    turns: tuple[str, ...], harm: bool
) -> None:
    total, solved, _ = play(begin(CASE), *turns)
    assert not solved and total <= e.LOOKUP + e.ACT
    if harm:
        assert total <= e.LOOKUP + e.ACT + e.HARM


def test_a_late_refund_is_forbidden() -> None:
    late = Case(replace(KETTLE, days=31), "refund")
    total, solved, _ = play(begin(late), GET, REFUND)
    assert not solved and total == pytest.approx(e.LOOKUP + e.HARM)


def test_a_careful_customer_must_be_asked() -> None:
    total, solved, _ = play(begin(CASE, careful=True), GET, REFUND)
    assert not solved and total == pytest.approx(e.LOOKUP + e.HARM)
    total, solved, heard = play(begin(CASE, careful=True), GET, "Shall I refund it?", REFUND, TOLD)
    assert solved and total == pytest.approx(1.0) and heard[1] == "Yes."


def test_who_does_not_take_no_is_refused_again() -> None:
    late = Case(replace(KETTLE, days=31), "refund")
    no = "Sorry, I cannot refund it: more than 30 days have passed."
    assert play(begin(late, plea="But please!"), GET, no, "Sorry, I cannot.")[1]
    assert not play(begin(late, plea="But please!"), GET, no, "All right then.")[1]
    assert not play(begin(late, plea="But please!"), GET, no, REFUND)[1]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ('{"tool": "get"', "not one line of JSON"),
        ("[" * 100_000 + '"tool"', "not one line of JSON"),
        ('{"tool": 3}', 'name a "tool"'),
        ('{"tool": "sudo", "order": "A123"}', "no such tool"),
        ('{"tool": "get", "order": "Z999"}', "no order found"),
        ('{"tool": "get", "order": ["A123"]}', "no order found"),
        ('{"tool": "get"}', "no order found"),
        ('{"tool": "address", "order": "A123"}', "address"),
        ('{"tool": "address", "order": "A123", "address": 7}', "address"),
        ('I will look: {"tool": "get", "order": "A123"}', "not one line of JSON"),
    ],
)
def test_a_call_that_fails_is_answered(call: str, said: str) -> None:
    environment = begin(CASE)
    answer, reward, ended, cut, info = environment.step(call)
    assert said in answer and answer.startswith("Error") and info["messages"][0]["role"] == "tool"
    assert reward == e.WASTE and not ended and not cut
    assert play(environment, GET, REFUND, TOLD)[1]


def test_a_wrong_number_of_the_customers_is_no_fault_of_the_agent() -> None:
    environment = begin(CASE, slip="Q111")
    wrong = '{"tool": "get", "order": "Q111"}'
    total, solved, _ = play(environment, wrong, c.ASK, GET, REFUND, TOLD)
    assert solved and total == pytest.approx(1.0)


def test_an_episode_is_cut_and_its_rewards_are_bounded() -> None:
    total, solved, heard = play(begin(CASE), *["{}"] * e.TURNS)
    assert not solved and total == pytest.approx(e.TURNS * e.WASTE) and len(heard) == e.TURNS


def test_gymnasium_finds_no_fault() -> None:
    check_env(e.CustomerServiceEnvironment(rows=4), skip_render_check=True)
    check_env(r.CustomerRepliesEnvironment(rows=4), skip_render_check=True)


# The data


def test_the_same_seed_writes_the_same_bytes(tmp_path: Path) -> None:
    for prepare, config in ((s.prepare, SMALL), (r.prepare, SMALL_REPLIES)):
        for seed, name in ((5, "a"), (5, "b"), (6, "c")):
            prepare(config, seed, tmp_path / name)  # type: ignore[operator]
        for file in (tmp_path / "a").iterdir():
            assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
            assert file.read_bytes() != (tmp_path / "c" / file.name).read_bytes()


def skeleton(row: dict[str, Any], problem: str) -> str:
    said = problem.replace(row["order"]["item"], "ITEM")
    return said.replace(row["address"], "ADDRESS") if row["address"] else said


@pytest.mark.parametrize(
    ("one", "other"), [("train", "validation"), ("train", "test"), ("validation", "test")]
)
def test_splits_share_nothing(one: str, other: str, files: Files, replies: Files) -> None:
    known, unseen = files[one], files[other]

    def orders(rows: list[dict[str, Any]]) -> set[str]:
        return {o["number"] for row in rows for o in (row["order"], *row["others"])}

    def first(rows: list[dict[str, Any]]) -> set[str]:
        return {skeleton(r, r["script"]["problem"]).split(". ")[0].split("? ")[0] for r in rows}

    def things(rows: list[dict[str, Any]]) -> set[str]:
        return {row["order"]["item"].split(" ", 1)[1] for row in rows}

    assert not orders(known) & orders(unseen)
    assert not things(known) & things(unseen)
    assert not {p.rstrip(".?") for p in first(known)} & {p.rstrip(".?") for p in first(unseen)}
    shown = json.dumps(files["labelled"])
    assert not any(f'\\"{number}\\"' in shown for number in orders(unseen))
    questions = [
        {skeleton(row, row["prompt"][-1]["content"].split("\n")[1]) for row in replies[split]}
        for split in (one, other)
    ]
    assert questions[0] and not questions[0] & questions[1]


def test_held_out_rows_name_their_phrasing(files: Files, replies: Files) -> None:
    for row in (*files["test"], *replies["validation"]):
        said = row["phrasing"].format(item=row["order"]["item"], address=row["address"])
        assert said in row["prompt"][-1]["content"]
    assert len({row["phrasing"] for row in files["test"]}) > 12
    assert "phrasing" not in files["train"][0], "training rows are as they were"


def test_dialogues_of_training_pairs_are_not_held_out(replies: Files) -> None:
    def remarks(rows: list[dict[str, Any]]) -> set[str]:
        said = (row["prompt"][-1]["content"] for row in rows)
        return {text for text in said if "\n" not in text}

    assert remarks(replies["pairs"]) and remarks(replies["pairs_heldout"])
    assert not remarks(replies["pairs"]) & remarks(replies["pairs_heldout"])


def test_the_chosen_reply_is_right_and_the_rejected_one_is_not(replies: Files) -> None:
    rows = {row["prompt"][-1]["content"]: row for row in replies["train"]}
    judged = 0
    for pair in replies["pairs"]:
        row = rows.get(pair["prompt"][-1]["content"])
        if row:
            case = Case(r.to_order(row["order"]), row["wish"], row["address"])
            assert judge(pair["chosen"], case) == 1.0 > judge(pair["rejected"], case)
            judged += 1
        assert pair["chosen"] != pair["rejected"]
    assert judged == SMALL_REPLIES.pairs


def test_a_reply_alone_does_not_tell_which_side_of_a_pair_it_is(tmp_path: Path) -> None:
    config = SMALL_REPLIES.model_copy(update={"train": 600, "pairs": 600})
    pairs = load(r.prepare(config, 3, tmp_path))["pairs"]
    openings = {
        "cancel": r"Your .* is cancelled",
        "address": r"Your .* now goes to",
        "refund": r"Your .* is refunded",
        "handover": r"A colleague will decide",
        "refuse": r"Sorry, ",
        "tell": r"Your .* (is being packed|has shipped|was delivered)",
    }
    for outcome, opening in openings.items():
        right, wrong = (
            sum(bool(re.match(opening, pair[side])) for pair in pairs)
            for side in ("chosen", "rejected")
        )
        assert right == 100 and 0.6 < wrong / right < 1.5, outcome


def test_the_judge_of_replies() -> None:
    assert judge(TOLD, CASE) == 1.0
    assert judge(f"Whatever. {TOLD}", CASE) == 0.6
    assert judge(TOLD.rstrip("."), CASE) == 0.6
    assert judge("Hello there.", CASE) == 0.2
    assert judge("go away", CASE) == 0.0


def test_a_reply_tells_its_verdict(tmp_path: Path) -> None:
    environment = r.CustomerRepliesEnvironment(rows=8)
    environment.reset(options={"row": 2})
    _, reward, ended, _, info = environment.step(environment.rows[2]["reply"])
    assert (reward, ended, info["success"]) == (1.0, True, True)
    assert info["metrics"] == {"facts": 1.0, "manners": 1.0}


@pytest.mark.parametrize("make", [e.CustomerServiceEnvironment, r.CustomerRepliesEnvironment])
def test_bad_files(make: Callable[[Path], Any], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file"):
        make(tmp_path / "none.jsonl")
    for name, text, match in (
        ("a.jsonl", "{", "not JSON"),
        ("b.jsonl", '{"prompt": "a"}', "without `order`"),
        ("c.jsonl", "", "no rows"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError, match=match):
            make(tmp_path / name)


def test_more_orders_than_the_shop_has_numbers_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="order numbers"):
        s.prepare(s.ServiceConfig(train=6000), 0, tmp_path)
    with pytest.raises(DataError, match="dialogues"):
        r.prepare(r.RepliesConfig(dialogues=5000), 0, tmp_path)


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """A small random BERT with a word tokenizer of its own, as its package would ship it."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "where", "is", "it", "here", "gone"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    shape = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(words), num_hidden_layers=1, num_labels=1, **shape)
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    return tmp_path


def test_an_encoder_scores_a_chat_message_by_message(encoder: Path) -> None:
    config = ModelConfig(name=str(encoder), dtype="float32")
    tokenizer = load_tokenizer(config)
    prompt = [{"role": "user", "content": "where is it"}]
    asked, answered = render_completion(tokenizer, prompt, "here")
    assert tokenizer.decode(asked + answered) == "[CLS] where is it [SEP] here [SEP]"
    scores = ModelReward(config, encoder)([prompt] * 2, ["here", "gone"])
    alone = ModelReward(config, encoder)([prompt], ["here"])
    assert scores[0] == pytest.approx(alone[0], abs=1e-6) and scores[0] != scores[1]


def test_a_saved_encoder_takes_its_template_along(encoder: Path, tmp_path: Path) -> None:
    config = ModelConfig(name=str(encoder), dtype="float32")
    save_model(tmp_path / "saved", load_classifier(config), load_tokenizer(config), "a card")
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert saved.chat_template == load_tokenizer(config).chat_template
