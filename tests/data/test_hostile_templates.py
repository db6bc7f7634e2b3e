"""A chat template may be a hostile program: it is ended, and the error has one line."""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from gearshift.data.chat import end_token_ids, render_prompt, render_supervised, render_turn
from gearshift.errors import DataError, ModelError
from gearshift.runtime import chat_template_renderer
from gearshift.runtime.chat_template_arguments import template_source
from gearshift.runtime.chat_template_renderer import EndlessTemplateError, renderer
from gearshift.types import Message
from tests.data.conftest import FAMILIES, PHI, bpe

ASKED: list[Message] = [{"role": "user", "content": "hi"}]
ANSWERED: list[Message] = [*ASKED, {"role": "assistant", "content": "yo"}]
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
ENDLESS = {
    "loops": (LOOP, "seconds"),
    # The text of a list is made in one call, which no check between steps sees.
    "lists in lists": (
        "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = [ns.x, ns.x] %}"
        "{% endfor %}{{ ns.x }}",
        "seconds",
    ),
    "format": ("{{ '%1000000000d' % 1 }}", "memory"),
    "doubling": (
        "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}"
        "{% endfor %}",
        "memory",
    ),
    "endless text": ("{% for i in range(99999) %}{{ 'x' * 100 }}{% endfor %}", "long"),
}
REFUSED = {
    "deep blocks": ("{% if 1 %}" * 3000 + "{% endif %}" * 3000, "recursion"),
    "deep lists": ("{{ " + "[" * 3000 + "]" * 3000 + " }}", "recursion"),
    "calls itself": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "huge": ("a" * (2 << 20), "characters"),
    "control characters": ("{{ raise_exception('\x1b[31m\x07no') }}", r"\\x1b\[31m\\x07no"),
    "many words": ("{{ raise_exception('x' * 10**6) }}", "xxxx"),
    "the system's files": ("{% include '/etc/passwd' %}", "no loader"),
}


@pytest.fixture
def short_time(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(chat_template_renderer, "SECONDS", 0.5)
    renderer.close()
    yield
    renderer.close()


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_that_does_not_end_is_ended(
    name: str, short_time: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, what = ENDLESS[name]
    if what != "seconds":
        # A slow machine must not end by its clock what another bound ends.
        monkeypatch.setattr(chat_template_renderer, "SECONDS", 120)
    tokenizer = bpe("<s>", "<|im_end|>", "<|endoftext|>", source)
    tokenizer.name_or_path = "some/model"
    with pytest.raises(EndlessTemplateError, match=rf"some/model .*{what}") as error:
        render_prompt(tokenizer, ASKED)
    assert "\n" not in str(error.value) and "another template" in str(error.value)
    assert render_prompt(FAMILIES["phi"].tokenizer, ASKED)


@pytest.mark.parametrize("name", REFUSED)
def test_a_template_that_cannot_be_rendered_is_told_in_one_line(name: str) -> None:
    source, what = REFUSED[name]
    tokenizer = bpe("<s>", "<|im_end|>", "<|endoftext|>", source)
    for render in (render_prompt, render_turn):
        with pytest.raises(DataError, match=what) as error:
            render(tokenizer, ASKED)
        assert str(error.value).isprintable() and len(str(error.value)) < 500
    end_token_ids(tokenizer)


def test_one_that_never_ends_is_not_tried_for_ever(short_time: None) -> None:
    only_answered = PHI + "{% if messages|length > 1 %}" + LOOP + "{% endif %}"
    tokenizer = bpe("<s>", "<|endoftext|>", "<|endoftext|>", only_answered)
    assert render_prompt(tokenizer, ASKED)
    for _ in range(3):
        with pytest.raises(EndlessTemplateError, match="seconds"):
            render_supervised(tokenizer, ANSWERED)
    with pytest.raises(EndlessTemplateError, match="ended 3 times and is not tried again"):
        render_supervised(tokenizer, ANSWERED)


def test_a_renderer_that_was_ended_is_started_again() -> None:
    tokenizer = FAMILIES["llama"].tokenizer
    renderer.start()
    process = renderer._process
    assert process and os.getsid(process.pid) != os.getsid(0), "Ctrl-C does not reach it"
    process.send_signal(signal.SIGKILL)
    process.wait()
    messages: list[Message] = [{"role": "user", "content": "after it was ended"}]
    assert render_prompt(tokenizer, messages) == tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )


def test_threads_get_their_own_texts() -> None:
    tokenizer = FAMILIES["qwen"].tokenizer
    said = [[{"role": "user", "content": f"{i} hello"}] for i in range(40)]
    expected = [
        tokenizer.apply_chat_template(m, add_generation_prompt=True, return_dict=False)
        for m in said
    ]
    found: dict[int, list[int]] = {}

    def render(i: int) -> None:
        found[i] = render_prompt(tokenizer, said[i])

    threads = [threading.Thread(target=render, args=(i,)) for i in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(40)] == expected


def test_a_forked_process_renders_while_a_thread_of_the_other_does() -> None:
    tokenizer = FAMILIES["qwen"].tokenizer
    said: list[Message] = [{"role": "user", "content": "in the other process"}]
    taken, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        with renderer._lock:
            taken.set()
            go_on.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    taken.wait()
    if (child := os.fork()) == 0:
        signal.alarm(60)
        os._exit(0 if render_prompt(tokenizer, said) else 1)
    go_on.set()
    thread.join()
    assert os.waitpid(child, 0)[1] == 0
    said[0]["content"] = "and in this one"
    assert "and in this one" in tokenizer.decode(render_prompt(tokenizer, said))


def test_a_working_folder_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    renderer.close()
    assert render_prompt(FAMILIES["qwen"].tokenizer, [{"role": "user", "content": "from nowhere"}])


def test_half_a_character_reaches_no_tokenizer() -> None:
    tokenizer = FAMILIES["phi"].tokenizer
    ids = render_prompt(tokenizer, [{"role": "user", "content": "a\ud800b"}])
    assert "a\ufffdb" in tokenizer.decode(ids)


def test_a_long_run_of_spaces_takes_no_longer_than_it_is() -> None:
    """Where an answer's end is looked for, a pattern must not begin anew at each space."""
    tokenizer = FAMILIES["phi"].tokenizer
    chat: list[Message] = [*ASKED, {"role": "assistant", "content": "a" + " " * 300_000 + "b"}]
    assert sum(render_supervised(tokenizer, chat)[1]) > 100


def test_a_template_that_is_no_text_is_refused() -> None:
    tokenizer = bpe("<s>", "<|im_end|>", "<|endoftext|>", PHI)
    tokenizer.chat_template = {"default": 3}
    with pytest.raises(ModelError, match="is not a text"):
        template_source(tokenizer)
