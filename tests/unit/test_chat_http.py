"""The HTTP of the chat server: statuses, limits, slow and vanishing clients, malformed requests."""

import base64
import hashlib
import json
import random
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
from support.chat_server import (
    MESSAGES,
    PATH,
    TIMEOUT,
    FakeModel,
    chat_server,
    check_responses,
    error_of,
    malformed_request,
    parse_responses,
    receive_all,
    wait_until,
)

from babygpt.chat.local_http import Limits
from babygpt.chat.server import make_page, serve
from babygpt.chat.template import ChatTemplate, chat_tokenizer
from babygpt.data.tokenizer import load_tokenizer
from babygpt.errors import UserError
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
# HTTP

HOST = b"Host: 127.0.0.1:PORT\r\n"
REQUESTS = {  # bytes -> expected status; after each of these errors, the connection closes
    b"POST " + PATH.encode() + b" HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n": 411,
    b"POST " + PATH.encode() + b" HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n": 501,
    b"POST " + PATH.encode() + b" HTTP/1.1\r\n" + HOST + b"Content-Length: 1000001\r\n\r\n": 413,
    b"POST " + PATH.encode() + b" HTTP/1.1\r\n" + HOST + b"Content-Length: 2000000\r\n\r\n" + b"x" * 2_000_000: 413,
    b"POST " + PATH.encode() + b" HTTP/1.1\r\n" + HOST + b"Content-Length: -5\r\n\r\n": 400,
    b"POST " + PATH.encode() + b" HTTP/1.1\r\n" + HOST + b"Content-Length: +5\r\n\r\n12345": 400,
    b"POST " + PATH.encode() + b" HTTP/1.1\r\n" + HOST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n123456": 400,
    b"POST " + PATH.encode() + b" HTTP/1.1\r\n" + HOST + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n": 400,
    b"POST " + PATH.encode() + b" HTTP/1.1\r\n" + HOST + b"Content-Length : 5\r\n\r\n12345": 400,
    b"POST /nowhere HTTP/1.1\r\n" + HOST + b"Content-Length: 5\r\n\r\n12345": 404,
    b"GET /../chat.html HTTP/1.0\r\n" + HOST + b"\r\n": 404,
    b"GET /%2e%2e/chat.py HTTP/1.0\r\n" + HOST + b"\r\n": 404,
    b"GET http://127.0.0.1:PORT/ HTTP/1.0\r\n" + HOST + b"\r\n": 404,
    b"GET /health?x=1 HTTP/1.0\r\n" + HOST + b"\r\n": 200,
    b"GET /health HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n": 200,
    b"GET /health HTTP/1.0\r\n" + HOST + b"Connection: keep-alive\r\n\r\n": 200,
    b"GET /health HTTP/1.1\r\n" + HOST + b"Content-Length: 3\r\n\r\nabc": 200,
    b"GET " + PATH.encode() + b" HTTP/1.0\r\n" + HOST + b"\r\n": 405,
    b"DELETE /health HTTP/1.0\r\n" + HOST + b"\r\n": 405,
    b"OPTIONS / HTTP/1.0\r\n" + HOST + b"\r\n": 405,
    b"TRACE / HTTP/1.1\r\n" + HOST + b"\r\n": 501,
    b"get / HTTP/1.1\r\n" + HOST + b"\r\n": 501,
    b"GET / HTTP/2.0\r\n" + HOST + b"\r\n": 505,
    b"GET / HTTP/x\r\n" + HOST + b"\r\n": 400,
    b"GET /\r\n\r\n": 403,
    b"nonsense\r\n\r\n": 400,
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n": 400,
    b"GET / HTTP/1.1\r\n" + HOST + b"no colon\r\n\r\n": 400,
    b"GET / HTTP/1.1\r\n" + HOST + b": no name\r\n\r\n": 400,
    b"GET / HTTP/1.1\r\n" + HOST + b"X: y\r\n" * 200 + b"\r\n": 431,
    b"GET / HTTP/1.1\r\n" + HOST + b"X: " + b"y" * 40_000 + b"\r\n\r\n": 431,
    b"GET /" + b"y" * 40_000 + b" HTTP/1.1\r\n" + HOST + b"\r\n": 414,
    b"GET / HTTP/1.0\r\n\r\n": 403,
    b"GET / HTTP/1.0\r\nHost: evil.example:PORT\r\n\r\n": 403,
    b"GET / HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n": 403,
    b"GET / HTTP/1.0\r\nHost: 127.0.0.1.evil.example:PORT\r\n\r\n": 403,
    b"GET / HTTP/1.0\r\n" + HOST + b"Host: evil.example\r\n\r\n": 403,
    b"GET / HTTP/1.0\r\n" + HOST + b"Host: localhost:PORT\r\n\r\n": 403,
    b"GET / HTTP/1.0\r\nHost: LOCALHOST:PORT\r\n\r\n": 200,
    b"GET / HTTP/1.0\r\n" + HOST + b"Origin: http://evil.example\r\n\r\n": 403,
    b"GET / HTTP/1.0\r\n" + HOST + b"Origin: null\r\n\r\n": 403,
    b"GET / HTTP/1.0\r\n" + HOST + b"Origin: https://127.0.0.1:PORT\r\n\r\n": 403,
    b"GET / HTTP/1.0\r\n" + HOST + b"Origin: http://localhost:PORT\r\n\r\n": 200,
}


@pytest.mark.parametrize(("data", "status"), REQUESTS.items())
def test_request_gets_its_status(shared_client, data, status):
    """Errors are JSON. The connection closes, so that no rest of the data is taken for another request."""
    received = shared_client.exchange(data.replace(b"PORT", str(shared_client.port).encode()))
    [(found, headers, body)] = parse_responses(received)
    assert found == status
    assert headers["X-Content-Type-Options"] == "nosniff"
    if status != 200:
        error_of(json.loads(body))
        assert headers["Content-Type"] == "application/json"
    assert ("Allow" in headers) == (status == 405)


def test_foreign_origin_cannot_start_a_completion(client, model):
    body = json.dumps({"messages": MESSAGES}).encode()
    for header in ({"Origin": "http://evil.example"}, {"Host": f"evil.example:{client.port}"}):
        assert client.request("POST", PATH, body, **header).status == 403
    assert client.request("POST", PATH, body, Origin=f"http://localhost:{client.port}").status == 200
    assert len(model.calls) == 1


def test_head_has_the_headers_of_get_without_body(client):
    for path in ("/", "/health", "/v1/models"):
        get, head = client.request("GET", path), client.request("HEAD", path)
        names = ("Content-Length", "Content-Type", "Content-Security-Policy")
        assert [head.getheader(name) for name in names] == [get.getheader(name) for name in names]
        assert head.status == 200
        received = client.exchange(b"HEAD %s HTTP/1.0\r\nHost: localhost:%d\r\n\r\n" % (path.encode(), client.port))
        assert received.partition(b"\r\n\r\n")[2] == b""


def test_connection_serves_several_requests(client):
    """Also after an error whose body was read, and if the requests arrive together."""
    data = client.post_bytes() + client.post_bytes(temperature=-1) + client.post_bytes()
    last = b"GET /health HTTP/1.1\r\nHost: localhost:%d\r\nConnection: close\r\n\r\n" % client.port
    responses = parse_responses(client.exchange(data + last))
    assert [status for status, _, _ in responses] == [200, 400, 200, 200]


def test_body_of_a_refused_request_is_not_a_request(client, model):
    """The connection closes after the error, and nothing in the body is executed."""
    hidden = client.post_bytes()
    for head in (b"POST /nowhere", b"PUT /health", b"GET /health"):
        request = b"%s HTTP/1.1\r\nHost: localhost:%d\r\nContent-Length: %d\r\n\r\n" % (head, client.port, len(hidden))
        assert len(parse_responses(client.exchange(request + hidden))) == 1
    assert not model.calls


def test_client_that_sends_a_large_body_gets_the_answer(client):
    """The server discards the body, although it has refused the request; otherwise, sending would fail."""
    assert client.request("POST", PATH, b"x" * 20_000_000).status == 413


def test_body_is_requested_after_the_checks(client):
    """A client that sends Expect: 100-continue need not send a body that is too large."""
    head, body = client.post_bytes().split(b"\r\n\r\n", 1)
    with client.connect() as connection:
        connection.sendall(head + b"\r\nExpect: 100-continue\r\n\r\n")
        assert connection.recv(65_536).startswith(b"HTTP/1.1 100 Continue\r\n")
        connection.sendall(body)
        assert connection.recv(65_536).startswith(b"HTTP/1.1 200 OK\r\n")
    too_large = re.sub(rb"Length: \d+", b"Length: 1000001", head) + b"\r\nExpect: 100-continue\r\n\r\n"
    assert client.exchange(too_large).startswith(b"HTTP/1.1 413 ")


def test_page_and_its_policy_allow_only_its_script(client, template):
    """The policy names the hashes of the style and the script; a model name cannot add a script."""
    response = client.request("GET", "/")
    policy = response.getheader("Content-Security-Policy")
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for tag in (b"style", b"script"):
        [content] = re.findall(rb"<%s>(.*?)</%s>" % (tag, tag), response.data, re.DOTALL)
        assert f"{tag.decode()}-src 'sha256-{base64.b64encode(hashlib.sha256(content).digest()).decode()}'" in policy
    assert not re.search(rb"(src|href)=.?(http|//)|innerHTML|insertAdjacentHTML|document\.write", response.data)
    assert len(response.data) < 25_000
    name = "</script><script>alert(1)</script>"
    page, _ = make_page(client.server.model.__class__(name, template, 64, SamplingParams(), None))
    assert page.count(b"</script>") == 2
    assert json.loads(re.search(rb"application/json\">(.*?)</script>", page)[1])["model"] == name


# ---------------------------------------------------------------------------------------------------------
# limits, slow clients and vanishing clients

QUICK = Limits(receive_seconds=0.3, send_seconds=0.3, linger_seconds=0.1)


def test_requests_beyond_the_queue_get_a_503(template, model):
    """They get a 503 with Retry-After, and all others are answered."""
    model.gate = threading.Event()
    with chat_server(template, model, Limits(waiting=2)) as client, ThreadPoolExecutor(8) as pool:
        first = pool.submit(client.complete)
        assert model.is_started.wait(TIMEOUT)
        waiting = [pool.submit(client.complete) for _ in range(2)]
        wait_until(lambda: len(client.server.worker.jobs) == 3)
        refused = client.request("POST", PATH, json.dumps({"messages": MESSAGES}).encode())
        assert (refused.status, refused.getheader("Retry-After")) == (503, "5")
        assert error_of(json.loads(refused.data))["type"] == "server_error"
        model.gate.set()
        assert [future.result(TIMEOUT)[0] for future in (first, *waiting)] == [200] * 3


def test_one_request_is_computed_at_a_time(template):
    active, most = [], []

    def generate(messages, params, stop):
        active.append(1)
        for piece in "abc":
            most.append(len(active))
            time.sleep(0.002)
            yield piece
        active.pop()

    model = FakeModel()
    model.generate = generate
    with chat_server(template, model) as client, ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: client.complete()[0], range(16)))
    assert results == [200] * 16
    assert max(most) == 1


def test_connections_beyond_the_limit_are_refused(template, model):
    with chat_server(template, model, Limits(connections=2)) as client:
        with client.connect(), client.connect():
            wait_until(lambda: len(client.server.connections) == 2)
            with client.connect() as third:
                [(status, headers, body)] = parse_responses(receive_all(third))
            assert (status, headers["Retry-After"]) == (503, "5")
            error_of(json.loads(body))
        wait_until(lambda: not client.server.connections)
        assert client.complete()[0] == 200


def drip(connection: socket.socket, data: bytes) -> bytes:
    """Send a byte every 20 ms until the server closes the connection, and return what it has sent."""
    received = b""
    connection.settimeout(0.02)
    for i in range(len(data)):
        connection.sendall(data[i : i + 1])
        try:
            if not (part := connection.recv(65_536)):
                return received
            received += part
        except TimeoutError:
            pass
    pytest.fail("the server waits for a slow client")


@pytest.mark.parametrize("part", ["line", "headers", "body"])
def test_client_that_sends_slowly_is_disconnected(template, model, part):
    """The time for the head and that for the body are limited, however often a byte arrives."""
    with chat_server(template, model, QUICK) as client, client.connect() as connection:
        head, body = client.post_bytes().split(b"\r\n\r\n", 1)
        if part == "line":
            assert drip(connection, b"G" * 60) == b""
        elif part == "headers":
            connection.sendall(head[:-1])
            assert drip(connection, b"1" * 60) == b""
        else:
            connection.sendall(re.sub(rb"Length: \d+", b"Length: 5000", head) + b"\r\n\r\n" + body)
            [(status, _, content)] = parse_responses(drip(connection, b" " * 60))
            assert status == 408
            error_of(json.loads(content))
        wait_until(lambda: not client.server.connections)
    assert not model.calls


def test_idle_connection_is_closed(template, model):
    with chat_server(template, model, QUICK) as client, client.connect() as idle, client.connect() as used:
        used.sendall(client.post_bytes())
        assert len(parse_responses(receive_all(used))) == 1
        assert receive_all(idle) == b""


def test_client_that_does_not_read_holds_nothing(template, model):
    """Neither the computation nor, for long, a thread."""
    model.pieces = ("x" * 1_000_000,) * 20
    with chat_server(template, model, QUICK) as client, socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(("127.0.0.1", client.port))
        slow.sendall(client.post_bytes(stream=True))
        wait_until(lambda: len(model.calls) == 1)
        wait_until(lambda: not client.server.worker.jobs)
        model.pieces = ("Hello",)
        assert client.complete()[0] == 200
        wait_until(lambda: not any("process_request" in thread.name for thread in threading.enumerate()))


@pytest.mark.parametrize("stream", [True, False])
def test_client_that_vanishes_stops_its_generation(client, model, stream):
    model.gate = threading.Event()
    with client.connect() as connection:
        connection.sendall(client.post_bytes(stream=stream))
        assert model.is_started.wait(TIMEOUT)
    assert model.is_stopped.wait(TIMEOUT)


def test_client_that_vanishes_stops_a_fast_generation(template, model):
    """Also if text arrives more often than the thread waits for it, and nothing is sent before the end."""
    model.pieces = ("x",) * 10**6

    def generate(messages, params, stop):
        try:
            for piece in model.pieces:
                model.is_started.set()
                time.sleep(0.002)
                yield piece
        finally:
            model.is_stopped.set()

    model.generate = generate
    with chat_server(template, model) as client:
        with client.connect() as connection:
            connection.sendall(client.post_bytes())
            assert model.is_started.wait(TIMEOUT)
        assert model.is_stopped.wait(TIMEOUT)


def test_clients_that_vanish_leave_the_queue(template, model):
    """Their requests are not computed and do not keep others out."""
    model.gate = threading.Event()
    with chat_server(template, model, Limits(waiting=3)) as client:
        with client.connect() as first:
            first.sendall(client.post_bytes())
            assert model.is_started.wait(TIMEOUT)
            waiting = [client.connect() for _ in range(3)]
            for connection in waiting:
                connection.sendall(client.post_bytes())
            wait_until(lambda: len(client.server.worker.jobs) == 4)
            assert client.complete()[0] == 503
            for connection in waiting:
                connection.close()
            wait_until(lambda: len(client.server.worker.jobs) == 1)
            model.gate.set()
            assert first.recv(65_536).startswith(b"HTTP/1.1 200 OK")
        assert client.complete()[0] == 200
        assert len(model.calls) == 2


def test_closing_the_server_ends_waiting_requests(template, model):
    """A client whose answer is not complete does not receive it as a complete one. One has sent its next request."""
    model.gate = threading.Event()
    with chat_server(template, model) as client:
        connections = [client.connect() for _ in range(3)]
        for i, connection in enumerate(connections):
            connection.sendall(client.post_bytes(stream=i == 0))
        wait_until(lambda: len(client.server.worker.jobs) == 3)
        connections[2].sendall(client.post_bytes())
        wait_until(model.is_started.is_set)
    for connection in connections:
        received = receive_all(connection)
        connection.close()
        assert b"[DONE]" not in received
        assert b"200 OK" not in received or b"text/event-stream" in received


def test_200_concurrent_requests_get_their_answers(template):
    """Streamed and not, each with its own text."""

    def generate(messages, params, stop):
        yield from re.findall(r"\S+\s*", messages[-1]["content"])

    def ask(i: int) -> bool:
        text, stream = f"message {i} of many", i % 2 == 0
        messages = [{"role": "user", "content": text}]
        if not stream:
            return client.complete(messages)[1]["choices"][0]["message"]["content"] == text
        chunks = client.stream(messages=messages)[:-1]
        return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == text

    model = FakeModel()
    model.generate = generate
    with chat_server(template, model, Limits(waiting=200)) as client, ThreadPoolExecutor(200) as pool:
        assert all(pool.map(ask, range(200)))


def test_port_in_use_is_a_user_error(shared_client, template):
    with pytest.raises(UserError, match=rf"--serve {shared_client.port}: the port cannot be opened \(Address"):
        serve(shared_client.server.model, shared_client.port)


# ---------------------------------------------------------------------------------------------------------
# malformed requests


def test_malformed_requests_are_answered_or_closed(template):
    """400 of them: every answer has a valid format, no thread hangs or fails, and the server works at the end."""
    model, rng = FakeModel(), random.Random(0)
    with chat_server(template, model, Limits(receive_seconds=0.2)) as client:
        requests = [malformed_request(rng, client) for _ in range(400)]
        with ThreadPoolExecutor(16) as pool:
            received = list(pool.map(client.exchange, requests))
        wait_until(lambda: not client.server.connections)
        assert client.complete()[0] == 200
    responses = [response for pair in zip(requests, received, strict=True) for response in check_responses(*pair)]
    assert all("Hello world".startswith(answer) for status, answer in responses if status == 200)
    statuses = [status for status, _ in responses]
    assert {200, 400, 403, 404, 411, 501} <= set(statuses)
    assert len(statuses) > 250


def test_damage_of_every_byte_of_the_head(template):
    """Each byte of the request line and headers is replaced; the connection always ends."""
    with chat_server(template, FakeModel(), Limits(receive_seconds=0.2)) as client:
        data = client.post_bytes()
        damaged = [data[:i] + b"\n" + data[i + 1 :] for i in range(data.index(b"\r\n\r\n"))]
        assert all(a != b for a, b in pairwise(damaged))
        with ThreadPoolExecutor(16) as pool:
            received = list(pool.map(client.exchange, damaged))
        assert all(parse_responses(part) for part in received if part)
        assert client.complete()[0] == 200
