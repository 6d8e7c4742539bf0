"""OpenAI's format of chat completions: requests, answers, and the chunks of a streamed answer.

>>> request = parse_request(b'{"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 20}', model, seed=1)
>>> request.answer("Hello", "stop", num_tokens=1)
{'id': 'chatcmpl-...', 'object': 'chat.completion', ...}

The field `model` is ignored, because a server has one model. Two fields are not in OpenAI's format: `top_k`, and
`truncation`, which is in that of another API of OpenAI. With "auto", the oldest turns that exceed the context are
dropped, and `dropped_messages` in the answer is their number. With "disabled", the default, such a request is an error.
"""

import json
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from typing import Any, NoReturn

from babygpt.chat.reply import fit_context, limit_to_context
from babygpt.chat.template import ChatTemplate, Conversation, check_conversation
from babygpt.constraints import violations
from babygpt.errors import UserError
from babygpt.nn.generation import SamplingParams

MAX_MESSAGES = 1000
MAX_STOPS = 4
MAX_TEMPERATURE = 2
SAMPLING_FIELDS = {  # field of a request -> field of SamplingParams; the last one given wins
    "temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "seed": "seed",
    "max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens",
}  # fmt: skip
# fields that would change the answer but are not supported, and the values that change nothing
UNSUPPORTED_FIELDS: dict[str, tuple] = {
    "n": (1,), "logprobs": (False,), "top_logprobs": (0,), "logit_bias": ({},),
    "presence_penalty": (0,), "frequency_penalty": (0,), "repetition_penalty": (1,), "min_p": (0,),
    "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],), "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},), "modalities": (["text"],), "audio": (), "web_search_options": (),
}  # fmt: skip


@dataclass(frozen=True)
class ChatModel:
    """A chat model, as the terminal session and the server use it."""

    name: str
    template: ChatTemplate
    block_size: int
    params: SamplingParams  # how tokens are sampled unless a request sets it
    # yields the text of each token of the assistant's next message, until `stop()`; see `reply`
    generate: Callable[[Conversation, SamplingParams, Callable[[], bool]], Iterator[str]]
    system: str | None = None  # system message of conversations that have none


class RequestError(Exception):
    """An error that the client receives, in OpenAI's format."""

    def __init__(self, status: HTTPStatus, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, f"{message:.1000}", param, code

    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class CompletionRequest:
    """A valid request, and the format of its answers."""

    model: str
    messages: Conversation
    params: SamplingParams  # with max_new_tokens that fit into the context
    stop: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False  # in a streamed answer
    num_prompt_tokens: int = 0
    num_dropped: int = 0
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def answer(self, text: str, finish_reason: str, num_tokens: int) -> dict[str, Any]:
        """Return the whole answer."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason}
        return {**self._head("chat.completion"), "choices": [choice], "usage": self._usage(num_tokens)}

    def chunk(self, delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
        """Return a part of a streamed answer."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        usage = {"usage": None} if self.include_usage else {}
        return {**self._head("chat.completion.chunk"), "choices": [choice], **usage}

    def usage_chunk(self, num_tokens: int) -> dict[str, Any]:
        """Return the last part of a streamed answer, for requests with `include_usage`."""
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": self._usage(num_tokens)}

    def _head(self, kind: str) -> dict[str, Any]:
        dropped = {"dropped_messages": self.num_dropped} if self.num_dropped else {}
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, **dropped}

    def _usage(self, num_tokens: int) -> dict[str, int]:
        total = self.num_prompt_tokens + num_tokens
        return {"prompt_tokens": self.num_prompt_tokens, "completion_tokens": num_tokens, "total_tokens": total}


def parse_request(body: bytes, model: ChatModel, seed: int) -> CompletionRequest:
    """Return the request of a JSON body; `seed` is used if it has none. RequestError if the request is invalid."""
    fields = {name: value for name, value in _parse_json(body).items() if value is not None}
    for name, neutral in UNSUPPORTED_FIELDS.items():
        if name in fields and not any(_equals(fields[name], value) for value in neutral):
            _refuse(f"{name} is not supported. Omit it.", name, "unsupported_parameter")
    _check_types(fields)
    messages = _parse_messages(fields.get("messages"), model.system)
    params = _parse_params(fields, replace(model.params, seed=seed))
    num_dropped = 0
    if fields.get("truncation") == "auto":
        try:
            messages, num_dropped = fit_context(model.template, messages, model.block_size, params.max_new_tokens)
        except UserError as error:
            _refuse(str(error), "messages", "context_length_exceeded")
    num_prompt_tokens = len(model.template.prompt(messages))
    if num_prompt_tokens >= model.block_size:
        _refuse(
            f"The prompt has {num_prompt_tokens:,} tokens, but the context has {model.block_size:,}, and the answer "
            "needs at least one. Use fewer or shorter messages.", "messages", "context_length_exceeded",
        )  # fmt: skip
    return CompletionRequest(
        model.name, messages, limit_to_context(params, num_prompt_tokens, model.block_size),
        _parse_stop(fields.get("stop", [])), fields.get("stream", False),
        fields.get("stream_options", {}).get("include_usage", False), num_prompt_tokens, num_dropped,
    )  # fmt: skip


def before_stop(text: str, start: int, stops: Sequence[str]) -> tuple[int, bool]:
    """Return the end of the text that is certainly before a stop string, and whether a stop string was found.

    The characters before `start` belong to no stop string. The end of the text may be the beginning of one. If several
    were found, the one that was complete first counts, so the result does not depend on how the text is divided.
    """
    if found := [(index + len(stop), index) for stop in stops if (index := text.find(stop, start)) >= 0]:
        return min(found)[1], True
    for index in range(start, len(text)):
        if any(stop.startswith(text[index:]) for stop in stops):
            return index, False
    return len(text), False


def _refuse(message: str, param: str | None = None, code: str | None = None) -> NoReturn:
    raise RequestError(HTTPStatus.BAD_REQUEST, message, param, code)


def _parse_json(body: bytes) -> dict[str, Any]:
    def refuse_constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is not JSON")

    try:
        fields = json.loads(body.decode(), parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        _refuse(f"The body is not valid JSON ({error!s:.200}).", code="invalid_json")
    if not isinstance(fields, dict):
        _refuse("The body must be a JSON object.", code="invalid_json")
    return fields


def _equals(value: Any, other: Any) -> bool:
    """Compare values of JSON, in which 1 and true differ."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _check_types(fields: dict[str, Any]) -> None:
    for name, expected, description in (("model", str, "a string"), ("stream", bool, "true or false")):
        if not isinstance(fields.get(name, expected()), expected):
            _refuse(f"{name} {fields[name]!r:.50} must be {description}.", name)
    options = fields.get("stream_options", {})
    if not isinstance(options, dict) or not isinstance(options.get("include_usage", False), bool):
        _refuse('stream_options must be an object, such as {"include_usage": true}.', "stream_options")
    if fields.get("truncation", "auto") not in ("auto", "disabled"):
        _refuse(f'truncation {fields["truncation"]!r:.50} must be "auto" or "disabled".', "truncation")


def _parse_messages(value: Any, system: str | None) -> Conversation:
    if isinstance(value, list) and len(value) > MAX_MESSAGES:
        _refuse(f"messages has {len(value):,} messages. Use at most {MAX_MESSAGES:,}.", "messages")
    try:
        messages = check_conversation([_join_parts(message) for message in value] if isinstance(value, list) else value)
    except ValueError as error:
        _refuse(f"messages is invalid: {error}.", "messages")
    if system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return messages


def _join_parts(message: Any) -> Any:
    """Return a message with a string as content if the content is a list of text parts."""
    if not isinstance(message, dict) or not isinstance(message.get("content"), list):
        return message
    parts = [part if isinstance(part, dict) and part.get("type") == "text" else {} for part in message["content"]]
    texts = [part["text"] for part in parts if isinstance(part.get("text"), str)]
    if not texts or len(texts) < len(parts):
        raise ValueError('a content must be a string, or a list of parts {"type": "text", "text": "..."}')
    return message | {"content": "".join(texts)}


def _parse_params(fields: dict[str, Any], params: SamplingParams) -> SamplingParams:
    for name, target in SAMPLING_FIELDS.items():
        if name not in fields:
            continue
        changes: dict[str, Any] = {target: fields[name]}
        params = replace(params, **changes)
        if problems := violations(params, format_name=str):
            _refuse(problems[0].replace(target, name, 1), name)
        if name == "temperature" and params.temperature > MAX_TEMPERATURE:
            _refuse(f"temperature {params.temperature} is out of range. Use at most {MAX_TEMPERATURE}.", name)
    return params


def _parse_stop(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MAX_STOPS or not all(isinstance(s, str) and s for s in stops):
        _refuse(f"stop must be a non-empty string, or a list of at most {MAX_STOPS} of them.", "stop")
    return tuple(stops)
