"""A chat server for tests: a fake model whose answers a test controls, and raw connections."""

import http.client
import io
import json
import random
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from babygpt.chat.completions import ChatModel
from babygpt.chat.local_http import Limits
from babygpt.chat.server import ChatServer
from babygpt.chat.template import ChatTemplate, Conversation
from babygpt.nn.generation import SamplingParams

TIMEOUT = 10  # seconds after which a test fails instead of hanging
PATH = "/v1/chat/completions"
USER = {"role": "user", "content": "Hi"}
MESSAGES = [USER]
# `malformed_request` chooses from these
MALFORMED_VALUES = [
    None, True, False, 0, 1, -1, 0.5, 1e308, -1e-300, 10**30, 2**63, "", "x", "auto", "\ud800", "x" * 500, [], {}, [[]],
    [None], {"a": 1}, {"type": "text"}, MESSAGES, [USER, {}], [{"role": "user", "content": [{"type": "text"}]}],
]  # fmt: skip
REQUEST_FIELDS = (
    "messages", "model", "stream", "stream_options", "temperature", "top_p", "top_k", "seed", "max_tokens",
    "max_completion_tokens", "stop", "n", "tools", "truncation", "logit_bias", "user", "response_format",
)  # fmt: skip


class FakeModel:
    """Yields `pieces`. With a gate, it waits after the first one until the gate is set or the answer is cancelled."""

    def __init__(self, pieces: tuple[str, ...] = ("Hel", "lo", " wor", "ld")):
        self.pieces, self.calls = pieces, []
        self.gate: threading.Event | None = None
        self.is_started, self.is_stopped = threading.Event(), threading.Event()
        self.error: Exception | None = None  # raised after the pieces

    def generate(self, messages: Conversation, params: SamplingParams, stop: Callable[[], bool]) -> Iterator[str]:
        self.calls.append((messages, params))
        for piece in self.pieces[: params.max_new_tokens]:
            yield piece
            self.is_started.set()
            while self.gate and not self.gate.wait(0.005):
                if stop():
                    break
            if stop():
                self.is_stopped.set()
                return
        if self.error:
            raise self.error


class Client:
    """Sends requests to a server."""

    def __init__(self, port: int, server: ChatServer | None = None):
        self.port, self.server, self.timeout = port, server, TIMEOUT

    def request(self, method: str, path: str, body: bytes | None = None, **headers: str) -> http.client.HTTPResponse:
        """Return the response to a request, on its own connection; its `data` is the body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=self.timeout)
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        response.data = response.read()
        connection.close()
        return response

    def complete(self, messages: object = MESSAGES, **fields: object) -> tuple[int, dict]:
        """Return status and JSON of a completion."""
        body = json.dumps({"messages": messages, **fields}).encode()
        response = self.request("POST", PATH, body)
        return response.status, json.loads(response.data)

    def stream(self, **fields: object) -> list[dict | str]:
        """Return the events of a streamed completion."""
        body = json.dumps({"messages": MESSAGES, "stream": True, **fields}).encode()
        response = self.request("POST", PATH, body)
        assert response.status == 200
        assert response.getheader("Content-Type") == "text/event-stream; charset=utf-8"
        return parse_events(response.data)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=self.timeout)

    def post_bytes(self, **fields: object) -> bytes:
        """Return the bytes of a valid completion request."""
        body = json.dumps({"messages": MESSAGES, **fields}).encode()
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost:{self.port}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body

    def exchange(self, data: bytes) -> bytes:
        """Send bytes, and return all that the server sends until it closes the connection."""
        with self.connect() as connection:
            with suppress(ConnectionError):
                connection.sendall(data)
            return receive_all(connection)


def malformed_request(rng: random.Random, client: Client) -> bytes:
    """Return random bytes, a request with damaged bytes, or one with random fields."""
    kind = rng.randrange(4)
    if kind == 0:
        return rng.randbytes(rng.randrange(1, 200)) + rng.choice([b"", b"\r\n\r\n"])
    count = rng.randrange(1, 4) if kind == 1 else 0
    fields = {rng.choice(REQUEST_FIELDS): rng.choice(MALFORMED_VALUES) for _ in range(count)}
    data = bytearray(client.post_bytes(**fields))
    for _ in range(rng.randrange(1, 6) if kind >= 2 else 0):
        i = rng.randrange(len(data) if kind == 2 else max(1, data.find(b"\r\n\r\n")))
        damage = rng.choice([b"", rng.randbytes(1), b"\r\n", b"\0", b"\r\n\r\n", b"\x85", bytes(data[:i])])
        data[i : i + rng.choice([0, 1, 1, 5])] = damage
    return bytes(data)


def receive_all(connection: socket.socket) -> bytes:
    received = b""
    with suppress(ConnectionError):
        while part := connection.recv(65_536):
            received += part
    return received


def error_of(content: dict) -> dict:
    assert set(content) == {"error"}
    assert set(content["error"]) == {"message", "type", "param", "code"}
    assert content["error"]["message"]
    return content["error"]


def parse_events(data: bytes) -> list[dict | str]:
    """Return the contents of server-sent events; the last one, [DONE], as a string."""
    events = data.decode().split("\n\n")
    assert events.pop() == ""
    assert all(event.startswith("data: ") for event in events)
    return [event[6:] if event == "data: [DONE]" else json.loads(event[6:]) for event in events]


def streamed_text(data: bytes) -> str:
    """Return the text of a streamed completion. AssertionError if it is incomplete."""
    *chunks, done = parse_events(data)
    assert done == "[DONE]", chunks[-1:]
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    return "".join(delta.get("content", "") for delta in deltas)


def parse_responses(data: bytes, method: str = "GET") -> list[tuple[int, dict[str, str], bytes]]:
    """Return status, headers and body of each response in the bytes of a connection."""
    file, responses = io.BytesIO(data), []
    while file.tell() < len(data):
        start = file.tell()
        response = http.client.HTTPResponse(FakeSocket(data[start:]), method=method)
        response.begin()
        body = response.read()
        head_size = data.index(b"\r\n\r\n", start) + 4 - start
        file.seek(start + head_size + len(body))
        responses.append((response.status, dict(response.getheaders()), body))
    return responses


def check_responses(request: bytes, data: bytes) -> list[tuple[int, str | None]]:
    """Return the status of each response in the bytes that a request got, and the answer if the status is 200.

    AssertionError for a 500, or an invalid answer or error.
    """
    if data.startswith(b"HTTP/1.1 200") and b"text/event-stream" in data:
        return [(200, streamed_text(data.split(b"\r\n\r\n", 1)[1]))]
    found = []
    for status, _, body in parse_responses(data, "HEAD" if request.startswith(b"HEAD") else "GET"):
        content = json.loads(body)
        if status != 200:
            error_of(content)
        assert status != 500, request
        found.append((status, content["choices"][0]["message"]["content"] if status == 200 else None))
    return found


class FakeSocket:
    def __init__(self, data: bytes):
        self.data = data

    def makefile(self, mode: str) -> io.BytesIO:
        return io.BytesIO(self.data)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, "the condition does not become true"
        time.sleep(0.005)


@contextmanager
def chat_server(template: ChatTemplate, model: FakeModel, limits: Limits | None = None, **fields) -> Iterator[Client]:
    """Serve a fake model; `fields` are those of ChatModel. At the end, all threads of the server must end."""
    before = set(threading.enumerate())
    defaults = {"name": "fake", "block_size": 64, "params": SamplingParams(max_new_tokens=20, temperature=0.8)}
    server = ChatServer(ChatModel(template=template, generate=model.generate, **defaults | fields), 0, limits)
    bugs = []
    server.handle_error = lambda *_: bugs.append(traceback_of_bug())
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield Client(server.server_port, server)
    finally:
        server.shutdown()
        server.close()
        thread.join(TIMEOUT)
    wait_until(lambda: set(threading.enumerate()) <= before)
    assert not server.connections
    assert not any(bugs), bugs


def traceback_of_bug() -> str | None:
    """Return the traceback of the current exception, unless it means that the client has gone."""
    is_bug = not isinstance(sys.exception(), ConnectionError | TimeoutError)
    return traceback.format_exc() if is_bug else None
