"""The settings of the HTTP server, and what it knows about itself while it runs."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class ServerSettings:
    """The address, the key and the limits of the server."""

    host: str = "127.0.0.1"
    """The address that the server listens on. Any address but loopback needs a key."""
    port: int = 8000
    """The port; 0 takes a free one."""
    key: str | None = field(default=None, repr=False)
    """The key that clients send; None asks for none."""
    people: tuple[str, ...] = ()
    """People who label, each by a key of their own (`guard.person_key`), which opens the labelling
    page alone."""
    allow_host: tuple[str, ...] = ()
    """Further names that a request's Host header may have."""
    allow_origin: tuple[str, ...] = ()
    """Origins of other sites whose pages may call the server, such as `https://example.org`."""
    max_waiting: int = 256
    """How many requests may wait for the engine; a further request gets status 429."""
    max_body: int = 8 << 20
    """The largest body of a request, in bytes; that of `/score` may have 16 MiB."""
    default_tokens: int = 1024
    """The most tokens of an answer to a request that names no limit."""
    drain: float = 30.0
    """How many seconds the requests in work may go on after a signal to end."""
    patience: float = 30.0
    """How many seconds a client has to send its request, and how long it may leave a full buffer of
    the answer unread."""
    connections: int = 512
    """How many clients may be connected; a further client gets status 503."""
    strict: bool = False
    """Whether a request with an unknown field is refused; otherwise the field is ignored."""


@dataclass
class ServerState:
    """What changes while the server runs."""

    loading: bool = False
    """Whether the models are still loaded; requests get status 503."""
    draining: bool = False
    """Whether a signal to end has come; new requests get status 503."""
