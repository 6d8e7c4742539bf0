"""The chat server with a fake model: OpenAI's format of requests, answers and errors."""

import json
import re
import threading
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.chat_server import (
    MESSAGES,
    PATH,
    USER,
    FakeModel,
    chat_server,
    error_of,
    parse_events,
    receive_all,
)

from babygpt.chat.completions import CompletionRequest
from babygpt.chat.template import ChatTemplate, chat_tokenizer
from babygpt.chat.worker import Job
from babygpt.data.tokenizer import load_tokenizer
from babygpt.nn.generation import SamplingParams


@pytest.fixture(scope="module")
def template():
    return ChatTemplate(chat_tokenizer(load_tokenizer("gpt2")))


@pytest.fixture
def model():
    return FakeModel()


@pytest.fixture
def client(template, model):
    with chat_server(template, model) as client:
        yield client


@pytest.fixture(scope="module")
def shared_client(template):
    with chat_server(template, FakeModel()) as client:
        yield client


# ---------------------------------------------------------------------------------------------------------
# OpenAI's format


def test_answer_has_the_format_of_openai(client, template):
    status, answer = client.complete(model="any")
    num_prompt_tokens = len(template.prompt(MESSAGES))
    assert status == 200
    assert re.fullmatch("chatcmpl-[0-9a-f]{32}", answer.pop("id"))
    assert abs(answer.pop("created") - time.time()) < 60
    assert answer == {
        "object": "chat.completion",
        "model": "fake",
        "choices": [
            {
                "index": 0, "message": {"role": "assistant", "content": "Hello world", "refusal": None},
                "logprobs": None, "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": num_prompt_tokens, "completion_tokens": 4, "total_tokens": num_prompt_tokens + 4},
    }  # fmt: skip


def test_streamed_answer_has_the_format_of_openai(client):
    *chunks, done = client.stream()
    assert done == "[DONE]"
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert len(choices) == len(chunks)
    assert choices[0]["delta"]["role"] == "assistant"
    assert "".join(choice["delta"].get("content", "") for choice in choices) == "Hello world"
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["stop"]
    assert choices[-1]["delta"] == {}


def test_stream_can_include_the_usage(client, template):
    *chunks, last, done = client.stream(stream_options={"include_usage": True})
    assert done == "[DONE]"
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 4
    assert last["usage"]["prompt_tokens"] == len(template.prompt(MESSAGES))


def test_text_is_streamed_while_it_is_generated(client, model):
    model.gate = threading.Event()
    with client.connect() as connection:
        connection.sendall(client.post_bytes(stream=True))
        received = b""
        while b"Hel" not in received:
            received += connection.recv(65_536)
        assert not model.gate.is_set()
        model.gate.set()
        events = parse_events((received + receive_all(connection)).split(b"\r\n\r\n", 1)[1])
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in events[:-1]) == "Hello world"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, SamplingParams(20, 0.8, seed=1337)),
        ({"temperature": 0, "top_k": 3, "top_p": 0.5, "seed": 7}, SamplingParams(20, 0, 3, 0.5, 7)),
        ({"temperature": 2, "top_p": 1, "max_tokens": 1}, SamplingParams(1, 2, 50, 1, 1337)),
        ({"max_tokens": 9, "max_completion_tokens": 2}, SamplingParams(2, 0.8)),
        (
            {"temperature": None, "top_k": None, "max_tokens": None, "stop": None, "stream": None},
            SamplingParams(20, 0.8),
        ),
        ({"max_tokens": 10**9}, SamplingParams(53, 0.8)),
    ],
)
def test_sampling_fields_reach_the_model(client, model, fields, expected):
    """The limit of new tokens is at most what the context has left."""
    assert client.complete(**fields)[0] == 200
    [(messages, params)] = model.calls
    assert messages == MESSAGES
    assert params == expected


def test_requests_without_seed_get_different_seeds(client, model):
    for fields in ({}, {}, {"seed": 5}, {}):
        client.complete(**fields)
    assert [params.seed for _, params in model.calls] == [1337, 1338, 5, 1340]


def test_answer_at_the_token_limit_has_reason_length(client):
    answers = [client.complete(max_tokens=n)[1] for n in (3, 4, 5)]
    assert [answer["choices"][0]["finish_reason"] for answer in answers] == ["length", "length", "stop"]
    assert [answer["usage"]["completion_tokens"] for answer in answers] == [3, 4, 4]


@pytest.mark.parametrize("stop", ["lo", ["lo wo"], ["xyz", "o w", "lo"], "Hello", "d"])
def test_answer_ends_before_a_stop_string(client, stop):
    strings = [stop] if isinstance(stop, str) else stop
    expected = "Hello world"[: min(i for s in strings if (i := "Hello world".find(s)) >= 0)]
    _, answer = client.complete(stop=stop)
    assert answer["choices"][0]["message"]["content"] == expected
    assert answer["choices"][0]["finish_reason"] == "stop"
    *chunks, _ = client.stream(stop=stop)
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == expected


@given(pieces=st.lists(st.text("ab", max_size=4), max_size=8), stops=st.lists(st.text("ab", min_size=1), max_size=3))
@example(pieces=["b", "ab", "a"], stops=["a", "baba"])  # "a" is complete first
@example(pieces=["abba"], stops=["bba", "bb"])
@settings(max_examples=200, deadline=None, derandomize=True)
def test_stop_strings_are_found_across_pieces(pieces, stops):
    """No part of a stop string is sent, and nothing else is delayed."""
    text = "".join(pieces)
    found = [(i + len(stop), i) for stop in stops if (i := text.find(stop)) >= 0]
    job = Job(CompletionRequest("fake", MESSAGES, SamplingParams(100), tuple(stops)))
    job.compute(lambda *_: iter(pieces))
    job.queue.put(None)
    assert job.wait(0) == (text[: min(found)[1] if found else None], True)


def test_character_of_a_stop_string_is_sent_at_once():
    """Only an end that may begin a stop string is delayed."""
    sent = []
    job = Job(CompletionRequest("fake", MESSAGES, SamplingParams(100), ("abc",)))

    def generate(*_):
        for piece in ("xa", "b", "x", "y"):
            yield piece
            sent.append(job.wait(0)[0])

    job.compute(generate)
    assert sent == ["x", "", "abx", "y"]


def test_generation_ends_at_a_stop_string(client, model):
    model.pieces = ("stop", *["x"] * 19)
    _, answer = client.complete(stop="st")
    assert answer["usage"]["completion_tokens"] == 1


def test_contents_may_be_lists_of_text_parts(client, model):
    parts = [{"type": "text", "text": "The "}, {"type": "text", "text": "model"}]
    assert client.complete([{"role": "user", "content": parts}])[0] == 200
    assert model.calls[0][0] == [{"role": "user", "content": "The model"}]


def test_system_message_of_the_server_is_a_default(template, model):
    with chat_server(template, model, system="Be brief.") as client:
        client.complete()
        client.complete([{"role": "system", "content": "Be long."}, *MESSAGES])
    assert [messages[0]["content"] for messages, _ in model.calls] == ["Be brief.", "Be long."]
    assert [len(messages) for messages, _ in model.calls] == [2, 2]


INVALID = [
    ({"messages": None}, "messages"), ({"messages": []}, "messages"), ({"messages": {}}, "messages"),
    ({"messages": "Hi"}, "messages"), ({"messages": [1]}, "messages"), ({"messages": [{"role": "user"}]}, "messages"),
    ({"messages": [{"role": "tool", "content": "Hi"}]}, "messages"), ({"messages": [USER] * 1001}, "messages"),
    ({"messages": [{"role": "user", "content": []}]}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "file"}]}]}, "messages"),
    ({"messages": [{"role": ["user"], "content": "Hi"}]}, "messages"),
    ({"temperature": -0.1}, "temperature"), ({"temperature": 2.1}, "temperature"),
    ({"temperature": "1"}, "temperature"), ({"temperature": True}, "temperature"),
    ({"top_p": 0}, "top_p"), ({"top_p": 1.1}, "top_p"), ({"top_k": 0}, "top_k"),
    ({"top_k": 1.5}, "top_k"), ({"seed": -1}, "seed"), ({"seed": 2**63}, "seed"), ({"seed": "a"}, "seed"),
    ({"max_tokens": 0}, "max_tokens"), ({"max_tokens": 1.0}, "max_tokens"),
    ({"max_completion_tokens": -1}, "max_completion_tokens"), ({"stream": "yes"}, "stream"), ({"stream": 1}, "stream"),
    ({"stop": ""}, "stop"), ({"stop": ["a"] * 5}, "stop"), ({"stop": [1]}, "stop"), ({"stop": 1}, "stop"),
    ({"stream_options": []}, "stream_options"), ({"stream_options": {"include_usage": 1}}, "stream_options"),
    ({"truncation": "on"}, "truncation"), ({"truncation": []}, "truncation"), ({"model": 1}, "model"),
    ({"n": 2}, "n"), ({"n": True}, "n"), ({"logprobs": True}, "logprobs"), ({"top_logprobs": 2}, "top_logprobs"),
    ({"tools": [{"type": "function"}]}, "tools"), ({"tool_choice": "required"}, "tool_choice"),
    ({"functions": [{}]}, "functions"), ({"logit_bias": {"1": 2}}, "logit_bias"),
    ({"response_format": {"type": "json_object"}}, "response_format"), ({"presence_penalty": 0.5}, "presence_penalty"),
    ({"frequency_penalty": -1}, "frequency_penalty"), ({"modalities": ["audio"]}, "modalities"),
    ({"min_p": 1}, "min_p"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param"), INVALID)
def test_invalid_fields_are_refused(shared_client, fields, param):
    status, content = shared_client.complete(**{"messages": MESSAGES, **fields})
    error = error_of(content)
    assert (status, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert error["message"].startswith((param, f"{param} "))


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"1", b"null", b'{"messages": NaN}', b"\xff\xfe", b'{"a": ' + b"[" * 100_000, b"1" * 5000,
     json.dumps({"messages": MESSAGES}).encode("utf-16"), b'{"messages": [{"role": "user", "content": "a\nb"}]}'],
)  # fmt: skip
def test_invalid_json_is_refused(shared_client, body):
    response = shared_client.request("POST", PATH, body)
    assert response.status == 400
    assert error_of(json.loads(response.data))["code"] == "invalid_json"


def test_fields_that_change_nothing_are_ignored(shared_client):
    harmless = {
        "user": "me", "metadata": {"a": 1}, "store": False, "n": 1, "tools": [], "logprobs": False, "logit_bias": {},
        "presence_penalty": 0.0, "response_format": {"type": "text"}, "service_tier": "auto", "unknown": [1],
        "parallel_tool_calls": True, "tool_choice": "auto",
    }  # fmt: skip
    assert shared_client.complete(**harmless)[0] == 200


def test_text_that_utf8_cannot_encode_is_accepted(shared_client):
    assert shared_client.complete([{"role": "user", "content": "\ud800 \0 ü"}])[0] == 200


def test_prompt_longer_than_the_context_is_refused(client, template, model):
    """The longest possible prompt leaves room for one token."""
    length = len(template.prompt([{"role": "user", "content": "a"}]))
    status, answer = client.complete([{"role": "user", "content": " a" * (64 - length)}])
    assert (status, answer["usage"]["prompt_tokens"], model.calls[0][1].max_new_tokens) == (200, 63, 1)
    status, content = client.complete([{"role": "user", "content": " a" * (65 - length)}])
    assert (status, error_of(content)["code"]) == (400, "context_length_exceeded")
    assert "64" in content["error"]["message"]


def test_truncation_drops_the_oldest_turns(client, model):
    turns = [{"role": role, "content": f"{role} {' a' * 8}"} for role in ("user", "assistant") * 3]
    messages = [{"role": "system", "content": "Be brief."}, *turns, USER]
    assert client.complete(messages)[0] == 400
    assert client.complete(messages, truncation="disabled")[0] == 400
    _, answer = client.complete(messages, truncation="auto", max_tokens=5)
    assert answer["dropped_messages"] == 4
    assert model.calls[0][0] == [messages[0], *messages[5:]]
    status, content = client.complete([{"role": "user", "content": " a" * 60}], truncation="auto")
    assert (status, error_of(content)["code"]) == (400, "context_length_exceeded")


def test_models_and_health(client):
    assert json.loads(client.request("GET", "/health").data) == {"status": "ok"}
    models = json.loads(client.request("GET", "/v1/models").data)
    assert models["object"] == "list"
    assert [(m["id"], m["object"]) for m in models["data"]] == [("fake", "model")]


# ---------------------------------------------------------------------------------------------------------
# errors of the model


def test_error_of_the_model_is_a_500(client, model, capsys):
    """The details are in the terminal, and the next request is answered."""
    model.pieces, model.error = (), RuntimeError("out of memory")
    for stream in (False, True):
        status, content = client.complete(stream=stream)
        assert (status, error_of(content)["type"]) == (500, "server_error")
        assert "out of memory" in content["error"]["message"]
    assert capsys.readouterr().err.count("Traceback") == 2
    model.pieces, model.error = ("fine",), None
    assert client.complete()[1]["choices"][0]["message"]["content"] == "fine"


def test_error_after_the_first_text_ends_the_stream(client, model, capsys):
    """The last event is the error, and there is no [DONE]; an answer that is not streamed is a 500."""
    model.error = RuntimeError("out of memory")
    assert client.complete()[0] == 500
    model.gate = threading.Event()
    threading.Timer(0.05, model.gate.set).start()
    *chunks, error = client.stream()
    assert chunks[0]["choices"][0]["delta"]["content"].startswith("Hel")
    assert "out of memory" in error_of(error)["message"]
    capsys.readouterr()
