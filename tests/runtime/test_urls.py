"""No secret of an address stands in a recipe, an error or a server's words."""

from __future__ import annotations

import base64
from urllib.parse import quote

import pytest

from gearshift.errors import ConfigError
from gearshift.runtime.urls import Endpoint, check_no_secret, checked_variable, redact_urls

SECRET = "s3cr/t+kéy"  # its forms in a query, in base64 and in JSON differ


@pytest.mark.parametrize(
    "url",
    [
        "http://h/score?token=S",
        "https://h?S",
        "judge:http://h/v1?api_key=${KEY}&token=S",
        "http://h/?a=${KEY}S",
        "http://h/?a=S${KEY}",
        "http://h/#S",
        "http://h/?a=${KEY}#S",
        "http://S@h/",
        "http://user:S@h/",
        "HTTPS://user:S@h/",
        "hf://user:S@owner/name",
        " http://user:S@h/ and more",
        "http://${KEY}/",
        "http://h/${s}",
    ],
)
def test_an_address_with_a_secret_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"an address|behind the host") as refused:
        check_no_secret(url)
    assert "S" not in str(refused.value).replace("${NAME}", "")
    with pytest.raises(ConfigError) as caught:
        Endpoint.of(url)
    assert "S" not in str(caught.value).replace("${NAME}", "").replace("HTTPS", "")


@pytest.mark.parametrize(
    "text",
    [
        "http://127.0.0.1:8000/score",
        "judge:https://h/v1?api_key=${KEY}&model=${MODEL}",
        "http://h/${KEY}/score",
        "http://h/?${KEY}",
        "See https://h/?a=1#b, or ask me@h.org.",
        "rewards.py:exact",
        "owner/name@main",
        "C:\\folder?",
        "",
    ],
)
def test_other_texts_are_not(text: str) -> None:
    check_no_secret(text)


def test_variables_are_filled_in_when_a_request_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", SECRET)
    address = Endpoint.of("http://h/${TOKEN}/score?t=${TOKEN}", "key")
    assert address.url == f"http://h/{quote(SECRET, safe='')}/score?t={quote(SECRET, safe='')}"
    assert address.display == "http://h/${TOKEN}/score"
    assert SECRET not in repr(address) and quote(SECRET, safe="") not in repr(address)
    assert "key" not in repr(address)
    monkeypatch.delenv("TOKEN")
    with pytest.raises(ConfigError, match=r"http://h/ names \$\{TOKEN\}, which is not set"):
        Endpoint.of("http://h/?t=${TOKEN}")


def test_what_was_sent_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", SECRET)
    address = Endpoint.of("http://h/score?t=${TOKEN}", "the-key")
    forms = [SECRET, quote(SECRET), quote(SECRET, safe=""), "s3cr/t+k\\u00e9y", "the-key"]
    forms += [base64.b64encode(SECRET.encode()).decode()]
    for at in (0, 250, 297, 299):  # where the text is cut too
        for form in forms:
            shown = address.redact("x" * at + f"{form}\x1b[31m\n" + "y" * 500)
            assert len(shown) <= 300 and "\x1b" not in shown and "\n" not in shown
            assert not any(form[:n] in shown for n in (len(form), 5))
    assert address.redact("go to https://u:p@h/a/b?t=1#f, now") == "go to https://h/a/b now"


def test_addresses_within_a_text() -> None:
    text = "A 404 for 'https://user:p@h:1/x/y?sig=S#S', see (http://h/z)"
    assert redact_urls(text) == "A 404 for 'https://h:1/x/y', see (http://h/z)"
    assert redact_urls("judge:http://h/v1?k=${K}") == "judge:http://h/v1"
    assert redact_urls("file.py:function?") == "file.py:function?"


@pytest.mark.parametrize("name", ["sk-abc", "hf_abcdef", "", "A B", "KEY\n", "9A"])
def test_a_key_in_place_of_a_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="the name, in capitals") as refused:
        checked_variable(name)
    assert not name or name not in str(refused.value)
    assert checked_variable("MY_KEY_2") == "MY_KEY_2"
