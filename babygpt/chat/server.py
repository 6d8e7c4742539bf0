"""A server for one user on this machine: a chat page and an OpenAI-compatible API.

    GET  /                       the page
    GET  /health                 {"status": "ok"}
    GET  /v1/models              the model
    POST /v1/chat/completions    an answer, streamed with "stream": true

One thread computes one answer at a time and never waits for a client. The thread of each connection sends the text that
is available, and stops the computation if the client closes the connection.
"""

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http import HTTPStatus
from pathlib import Path
from typing import Any, ClassVar

from babygpt.chat.completions import ChatModel, RequestError, parse_request
from babygpt.chat.local_http import HOST, Limits, LocalHandler, LocalServer
from babygpt.chat.worker import Job, Worker
from babygpt.errors import UserError

PAGE = Path(__file__).with_name("chat.html")
POLL_SECONDS = 0.2  # how often a thread that waits for text checks whether the client has closed the connection


class ChatServer(LocalServer):
    """Serves a model on a port of 127.0.0.1; with port 0, on any free port. OSError if the port is in use."""

    def __init__(self, model: ChatModel, port: int, limits: Limits | None = None):
        limits = limits or Limits()
        super().__init__(port, ChatHandler, limits)
        self.model, self.created, self.num_requests = model, int(time.time()), 0
        self.parsing = threading.Lock()  # one at a time: parsed JSON can be many times larger than the body
        self.page, self.response_headers["Content-Security-Policy"] = make_page(model)
        self.worker = Worker(model.generate, limits.waiting)

    def next_seed(self) -> int:
        """Return the seed of a request that has none: a different one for each request."""
        with self.lock:
            self.num_requests += 1
            return (self.model.params.seed + self.num_requests - 1) % 2**63

    def close(self) -> None:
        """Stop the computation, and close the port and all connections, so that all threads end."""
        self.worker.close()
        super().close()


class ChatHandler(LocalHandler):
    """Answers the requests of one connection."""

    PATHS: ClassVar = {
        "/": ("GET", "HEAD"), "/health": ("GET", "HEAD"), "/v1/models": ("GET", "HEAD"),
        "/v1/chat/completions": ("POST",),
    }  # fmt: skip
    server: ChatServer

    def answer(self, path: str, body: bytes) -> None:
        if path == "/":
            self.send(HTTPStatus.OK, self.server.page, "text/html; charset=utf-8")
        elif path == "/health":
            self.send_json(HTTPStatus.OK, {"status": "ok"})
        elif path == "/v1/models":
            model = {"id": self.server.model.name, "object": "model", "created": self.server.created}
            self.send_json(HTTPStatus.OK, {"object": "list", "data": [model | {"owned_by": "babygpt"}]})
        else:
            self.complete(body)

    def complete(self, body: bytes) -> None:
        """Compute and send the answer of the model."""
        with self.server.parsing:
            request = parse_request(body, self.server.model, self.server.next_seed())
        job = Job(request)
        if not self.server.worker.submit(job):
            raise RequestError(
                HTTPStatus.SERVICE_UNAVAILABLE,
                f"{self.server.limits.waiting} requests are waiting, which is the maximum. Try again later.",
            )
        try:
            texts = self.texts(job)
            first = next(texts, "")  # if there is no text, an error can still be sent as a status
            text = first if request.stream else first + "".join(texts)
            if job.error and not (request.stream and first):
                raise RequestError(HTTPStatus.INTERNAL_SERVER_ERROR, job.error)
            if request.stream:
                self.stream(job, first, texts)
            else:
                self.send_json(HTTPStatus.OK, request.answer(text, job.finish_reason, job.num_tokens))
        finally:
            self.server.worker.cancel(job)

    def texts(self, job: Job) -> Iterator[str]:
        """Yield the text of a job as it is computed. ConnectionError if the client has closed the connection.

        All text that was computed since the last one is yielded at once. So after the end of the computation, a slow
        client can delay the thread by no more than one write.
        """
        is_last = False
        while not is_last:
            text, is_last = job.wait(POLL_SECONDS)
            if self.is_disconnected():
                raise ConnectionAbortedError
            if text:
                yield text

    def stream(self, job: Job, first: str, texts: Iterator[str]) -> None:
        """Send server-sent events: the first text, and the others when they are computed. Then close the connection."""
        self.start_response(HTTPStatus.OK, "text/event-stream; charset=utf-8", {"Connection": "close"})
        self.send_event(job.request.chunk({"role": "assistant", "content": first}))
        for text in texts:
            self.send_event(job.request.chunk({"content": text}))
        if job.error:
            return self.send_event(RequestError(HTTPStatus.INTERNAL_SERVER_ERROR, job.error).body())
        self.send_event(job.request.chunk({}, job.finish_reason))
        if job.request.include_usage:
            self.send_event(job.request.usage_chunk(job.num_tokens))
        self.write(b"data: [DONE]\n\n")

    def send_event(self, event: dict[str, Any]) -> None:
        self.write(f"data: {json.dumps(event)}\n\n".encode())


def make_page(model: ChatModel) -> tuple[bytes, str]:
    """Return the page, and its Content-Security-Policy, which allows only the style and the script of the page."""
    params = model.params
    data = {
        "model": model.name, "system": model.system or "", "temperature": params.temperature, "top_k": params.top_k,
        "max_tokens": params.max_new_tokens,
    }  # fmt: skip
    page = PAGE.read_text(encoding="utf-8").replace("DATA", json.dumps(data).replace("<", "\\u003c"), 1)
    hashes = {}
    for tag in ("style", "script"):
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        hashes[tag] = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
    return page.encode(), (
        f"default-src 'none'; style-src 'sha256-{hashes['style']}'; script-src 'sha256-{hashes['script']}'; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def serve(model: ChatModel, port: int) -> None:
    """Serve a model until Ctrl-C. UserError if the port cannot be used."""
    try:
        server = ChatServer(model, port)
    except OSError as error:
        raise UserError(
            f"--serve {port}: the port cannot be opened ({error.strerror}). Use another port, or 0 for any free port."
        ) from None
    url = f"http://{HOST}:{server.server_port}"
    print(f"Chat page: {url}\nOpenAI-compatible API: {url}/v1\nPress Ctrl-C to stop.", flush=True)
    with suppress(KeyboardInterrupt):
        server.serve_forever()
    server.close()
