"""The URLs in recipes, and the secrets that are sent to them.

A recipe is kept, shown and tracked, so it contains no secret: it names environment variables
instead.
"""

from __future__ import annotations

import base64
import json
import os
import re
from dataclasses import dataclass, field
from urllib.parse import quote

from gearshift.errors import ConfigError
from gearshift.runtime.terminal import one_line

_NAME = "[A-Z_][A-Z0-9_]*"
_REFERENCE = re.compile(rf"\$\{{({_NAME})\}}")
_ADDRESS = re.compile(r"\s*([a-z]+:)?[a-z][a-z0-9+.-]*://", re.IGNORECASE)
"""How a URL begins; a kind may stand before it, as in `judge:http://`."""
_IN_TEXT = re.compile(
    r"""([a-z][a-z0-9+.-]*://)(?:[^\s/?#"'<>]*@)?([^\s?#"'<>]*)(?:[?#][^\s"'<>]*)?""", re.IGNORECASE
)
_QUERY = re.compile(rf"(?:[\w.-]+=)?\$\{{{_NAME}\}}(?:&(?:[\w.-]+=)?\$\{{{_NAME}\}})*")
"""A query whose values are all references to environment variables."""


def checked_variable(name: str) -> str:
    """The name of an environment variable, which must be in capitals, so that it is hardly a secret
    itself.

    Raises `ValueError`, without the text itself, for any other text.
    """
    if not re.fullmatch(_NAME, name):
        raise ValueError(
            "this must be the name, in capitals, of an environment variable that holds the key, "
            "and not the key itself; export MY_KEY, and write MY_KEY."
        )
    return name


def check_no_secret(text: str) -> None:
    """Raises `ValueError`, without what it found, for a URL that contains a possible secret: a
    user, a password, a fragment, or a query whose values are not written as `${NAME}`.
    """
    start = _ADDRESS.match(text)
    if not start:
        return
    place, mark, query = text[start.end() :].partition("?")
    host = place.partition("/")[0]
    if "@" in host:
        raise ValueError(
            "an address must not contain a user or a password, because a recipe is kept; put the "
            "key into an "
            "environment variable, and its name into key_env or, as ${NAME}, into the query."
        )
    if "#" in text or (mark and not _QUERY.fullmatch(query)):
        raise ValueError(
            "the query and the fragment of an address may contain secrets, and a recipe is kept; "
            "write "
            "?name=${NAME} and export NAME, which is filled in when a request is sent."
        )
    if "$" in host or "$" in _REFERENCE.sub("", place):
        raise ValueError(
            "an environment variable may stand behind the host, in capitals, as in /${NAME}."
        )


def redact_urls(text: str) -> str:
    """The text, in which each URL loses its user, password, query and fragment."""
    return _IN_TEXT.sub(r"\1\2", text)


@dataclass(frozen=True)
class Endpoint:
    """Where a request goes, and the secrets that it carries, which no text may show."""

    display: str
    """The URL without its query, for messages."""
    url: str = field(repr=False)
    """The URL with the values of its environment variables, for requests."""
    key: str | None = field(repr=False)
    """The bearer token."""
    secrets: tuple[str, ...] = field(repr=False)

    @classmethod
    def of(cls, url: str, key: str | None = None) -> Endpoint:
        """Raises `ConfigError` if an environment variable that the URL names is not set, or if the
        URL contains a possible secret.
        """
        try:
            check_no_secret(url)
        except ValueError as error:
            raise ConfigError(f"{redact_urls(url)}: {error}") from None
        names = dict.fromkeys(_REFERENCE.findall(url))
        values = {name: os.environ.get(name, "").strip() for name in names}
        if missing := [name for name, value in values.items() if not value]:
            raise ConfigError(
                f"{redact_urls(url)} names ${{{missing[0]}}}, which is not set; export it."
            )
        sent = _REFERENCE.sub(lambda found: quote(values[found[1]], safe=""), url)
        secrets = {form for secret in (*values.values(), key) if secret for form in _forms(secret)}
        longest_first = sorted(secrets, key=lambda s: (-len(s), s))
        return cls(redact_urls(url), sent, key, tuple(longest_first))

    def redact(self, text: str, most: int = 300) -> str:
        """A text from a server or a library, in one line, cut, and without the secrets of the
        request.
        """
        text = text[: 1 << 20]
        for secret in self.secrets:
            text = text.replace(secret, "[secret]")
        return one_line(redact_urls(text), most)


def _forms(secret: str) -> set[str]:
    """The forms in which a server may repeat a secret."""
    plain = base64.b64encode(secret.encode()).decode()
    return {secret, quote(secret), quote(secret, safe=""), json.dumps(secret)[1:-1], plain}
