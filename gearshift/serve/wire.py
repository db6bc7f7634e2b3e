"""The requests that clients send, as pydantic models, and what they ask of the engine.

The field names are OpenAI's, and those of vLLM's further fields. Each error is one line that names
the field.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gearshift.data.chat_template import REASONING
from gearshift.errors import ConfigError
from gearshift.runtime.terminal import one_line
from gearshift.serve.api_error import ApiError
from gearshift.types import Message, SamplingParams

NO_EFFECT = frozenset(
    [
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "verbosity",
        "moderation",
        "parallel_tool_calls",
        "add_special_tokens",
    ]
)
"""Fields that are accepted and change nothing."""
_NO_OPS: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "suffix": ("",),
    "prompt_logprobs": (),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
}
"""Fields that are not built, and the values of them that ask for nothing."""
_ROLES = ("system", "developer", "user", "assistant", "tool")
_KEPT = ("name", "tool_calls", "tool_call_id")

Number = Annotated[float, Field(allow_inf_nan=False)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
Token = Annotated[int, Field(ge=0, lt=2**31)]


class StreamOptions(BaseModel):
    """How a stream is sent."""

    model_config = ConfigDict(extra="allow", strict=True)
    include_usage: bool = False


class Extras(BaseModel):
    """Gearshift's own field of a request."""

    model_config = ConfigDict(extra="forbid", strict=True)
    tokens: bool = False


class SamplingRequest(BaseModel):
    """The fields that chats and completions share."""

    model_config = ConfigDict(extra="allow", strict=True)
    asked_in: ClassVar[str]
    """The field that holds what is to be answered."""
    model: str
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: int | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stop: str | Annotated[list[str], Field(max_length=32)] | None = None
    stop_token_ids: Annotated[list[Token], Field(max_length=1024)] | None = None
    logit_bias: Annotated[dict[str, Number], Field(max_length=1024)] | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    ignore_eos: bool = False
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    gearshift: Extras = Extras()

    @property
    def wanted(self) -> int | None:
        """The most tokens of the answer that the request names."""
        return self.max_tokens

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(stop for stop in given if stop)

    def params(self, most: int, top: int | None, ends: frozenset[int]) -> SamplingParams:
        """What the engine gets, for at most `most` tokens; `ends` are the model's end tokens. `top`
        is the number of alternatives whose log-probs are wanted; None: no log-probs.
        """
        try:
            return SamplingParams(
                temperature=_or(self.temperature, 1.0),
                top_p=_or(self.top_p, 1.0),
                top_k=max(0, self.top_k or 0),
                min_p=self.min_p or 0.0,
                repetition_penalty=_or(self.repetition_penalty, 1.0),
                presence_penalty=self.presence_penalty or 0.0,
                frequency_penalty=self.frequency_penalty or 0.0,
                max_new_tokens=most,
                min_new_tokens=self.min_tokens or 0,
                stop=self.stops,
                stop_token_ids=tuple(self.stop_token_ids or ()),
                logit_bias=self.bias(),
                bad_words=tuple((token,) for token in sorted(ends)) if self.ignore_eos else (),
                seed=None if self.seed is None else self.seed % 2**63,
                top_logprobs=top,
            )
        except ConfigError as error:
            raise ApiError(400, "invalid_value", one_line(str(error))) from error

    def bias(self) -> tuple[tuple[int, float], ...]:
        """(token, what is added to its logit). Raises `ApiError` for other keys and values."""
        found = {}
        for token, value in (self.logit_bias or {}).items():
            if not (token.isdecimal() and len(token) < 10 and -100 <= value <= 100):
                words = "logit_bias must map token ids to numbers from -100 to 100"
                raise ApiError(400, "invalid_value", words, "logit_bias")
            found[int(token)] = value
        return tuple(found.items())


class ChatRequest(SamplingRequest):
    """The body of `POST /v1/chat/completions`."""

    asked_in = "messages"
    messages: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=1 << 14)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    @property
    def wanted(self) -> int | None:
        """`max_completion_tokens` wins over `max_tokens`."""
        most = self.max_completion_tokens or self.max_tokens
        if most == 0:
            raise ApiError(400, "invalid_value", "max_tokens must be 1 or more", "max_tokens")
        return most

    @property
    def top(self) -> int | None:
        """How many alternatives of each token are wanted; None: no log-probs."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(SamplingRequest):
    """The body of `POST /v1/completions`."""

    asked_in = "prompt"
    prompt: str | list[str] | list[Token] | list[list[Token]]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
    best_of: int | None = None


class TokenizeRequest(BaseModel):
    """The body of `POST /tokenize`: a prompt, or messages."""

    model_config = ConfigDict(extra="allow", strict=True)
    model: str = "default"
    prompt: str | None = None
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)] | None = None
    add_special_tokens: bool = True
    return_token_strs: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeRequest(BaseModel):
    """The body of `POST /detokenize`."""

    model_config = ConfigDict(extra="allow", strict=True)
    model: str = "default"
    tokens: Annotated[list[Token], Field(max_length=1 << 20)]


M = TypeVar("M", bound=BaseModel)


def parse(kind: type[M], body: dict[str, Any]) -> M:
    """The request in a body. Raises `ApiError` that names the first wrong field."""
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = [str(part) for part in first["loc"] if not _is_branch(part)]
        words = f"{'.'.join(place) or 'the body'}: {first['msg'][:1].lower()}{first['msg'][1:]}"
        param = place[0] if place else None
        raise ApiError(400, "invalid_value", one_line(words), param) from None


def check_fields(request: BaseModel, strict: bool) -> list[str]:
    """The names of the unknown fields. Raises `ApiError` for what is not built, and with `strict`
    for unknown fields too.
    """
    given = dict(request.model_extra or {})
    if given.get("tool_choice") == "none":
        given.pop("tools", None)
    for name, value in given.items():
        if name in _NO_OPS and value is not None and value not in _NO_OPS[name]:
            raise ApiError(400, "unsupported_parameter", f"{name} is not built yet", name)
    unknown = sorted(given.keys() - _NO_OPS.keys() - NO_EFFECT)
    if unknown and strict:
        words = f"the field {one_line(unknown[0], 60)} is unknown; leave it out"
        raise ApiError(400, "unsupported_parameter", words, unknown[0])
    return unknown


def messages_of(given: list[dict[str, Any]]) -> list[Message]:
    """The conversation of a request. Raises `ApiError` for other roles, and for parts that are no
    text.
    """
    found = []
    for i, message in enumerate(given):
        role = message.get("role")
        if role not in _ROLES:
            words = f"messages[{i}].role must be one of {', '.join(_ROLES)}"
            raise ApiError(400, "invalid_value", words, "messages")
        kept: Message = {"role": "system" if role == "developer" else role}
        kept["content"] = _text(i, message.get("content"))
        if thoughts := [message[key] for key in REASONING if message.get(key) is not None]:
            kept[REASONING[0]] = thoughts[0]
        kept |= {k: message[k] for k in _KEPT if k in message and message[k] not in (None, [])}
        for key in ("name", "tool_call_id", REASONING[0]):
            if not isinstance(kept.get(key, ""), str):
                words = f"messages[{i}].{key} must be a text"
                raise ApiError(400, "invalid_value", words, "messages")
        found.append(kept)
    return found


def _text(i: int, content: Any) -> str:
    """The text of a message: its content, or its parts joined by newlines."""
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for part in content if isinstance(content, list) else [None]:
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        if not isinstance(text, str):
            words = f"messages[{i}].content must be a text, or parts of type text"
            raise ApiError(400, "invalid_value", words, "messages")
        texts.append(text)
    return "\n".join(texts)


def _or(value: float | None, other: float) -> float:
    return other if value is None else value


def _is_branch(part: Any) -> bool:
    """Whether pydantic put this word into a place to name one type of several."""
    return isinstance(part, str) and ("[" in part or part in ("str", "int", "float", "bool"))
