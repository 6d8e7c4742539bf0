"""An HTTP server for this machine only, with limits for every client. Errors are JSON in OpenAI's format.

It listens on 127.0.0.1. It refuses requests that another website may have caused: those with a foreign Origin, or with
a Host that a foreign name server may have pointed to this machine (DNS rebinding). The number of connections and bytes,
and the time for sending a request and for receiving data, are limited.
"""

import http.client
import io
import json
import re
import socket
import sys
import threading
import time
from abc import ABC, abstractmethod
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any, ClassVar

from babygpt.chat.completions import RequestError

HOST = "127.0.0.1"
RETRY_SECONDS = 5  # in a Retry-After header


@dataclass(frozen=True)
class Limits:
    """What clients may use."""

    connections: int = 256
    waiting: int = 32  # requests in the queue
    head_bytes: int = 32_768  # request line and headers
    body_bytes: int = 1_000_000
    receive_seconds: float = 30  # for receiving the head of a request, including the idle time before it, or a body
    send_seconds: float = 10  # for each write
    linger_seconds: float = 2  # for discarding what a client still sends when its connection is closed


class LocalServer(ThreadingHTTPServer):
    """Listens on a port of 127.0.0.1; with port 0, on any free port. OSError if the port is in use."""

    daemon_threads = True
    request_queue_size = 256  # connections that wait to be accepted

    def __init__(self, port: int, handler: type["LocalHandler"], limits: Limits):
        self.limits, self.lock = limits, threading.Lock()
        self.connections: set[socket.socket] = set()
        self.response_headers = {  # of every response
            "X-Content-Type-Options": "nosniff", "Cross-Origin-Resource-Policy": "same-origin",
            "Referrer-Policy": "no-referrer", "Cache-Control": "no-store",
        }  # fmt: skip
        super().__init__((HOST, port), handler)
        names = (HOST, "localhost")
        self.hosts = {*(f"{name}:{self.server_port}" for name in names), *(names if self.server_port == 80 else ())}
        self.origins = {f"http://{host}" for host in self.hosts}

    def server_bind(self) -> None:
        TCPServer.server_bind(self)  # HTTPServer.server_bind asks a name server for the name of the host
        self.server_name, self.server_port = HOST, self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        """Handle a connection in its own thread, or refuse it if too many are open."""
        with self.lock:
            if is_accepted := len(self.connections) < self.limits.connections:
                self.connections.add(request)
        if is_accepted:
            return super().process_request(request, client_address)
        message = f"{self.limits.connections} connections are open, which is the maximum. Try again later."
        body = json.dumps(RequestError(HTTPStatus.SERVICE_UNAVAILABLE, message).body()).encode()
        head = (
            f"HTTP/1.1 503 Service Unavailable\r\nRetry-After: {RETRY_SECONDS}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        with suppress(OSError):
            request.settimeout(0)
            request.sendall(head.encode() + body)
        self.close_request(request)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection, but first discard what the client still sends.

        Closing with unread data would reset the connection, and the client might lose the answer.
        """
        with suppress(OSError):
            request.shutdown(socket.SHUT_WR)
            deadline = time.monotonic() + self.limits.linger_seconds
            while (remaining := deadline - time.monotonic()) > 0:
                request.settimeout(remaining)
                if not request.recv(65_536):
                    break
        self.close_request(request)
        with self.lock:
            self.connections.discard(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print the traceback of a bug, and nothing if the client has disconnected."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)

    def close(self) -> None:
        """Close the port and all connections, so that their threads end."""
        self.server_close()
        with self.lock:
            for connection in self.connections:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)


class RequestReader(io.RawIOBase):
    """Reads from a socket, up to a deadline and about a number of bytes: the last read may exceed it."""

    def __init__(self, connection: socket.socket):
        self.connection = connection
        self.allow(0, 0)

    def allow(self, num_bytes: int, seconds: float) -> None:
        self.num_bytes, self.deadline = num_bytes, time.monotonic() + seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        remaining = self.deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError("the request takes too long")
        if self.num_bytes <= 0:
            raise http.client.HTTPException("the request is too long")
        self.connection.settimeout(remaining)
        count = self.connection.recv_into(buffer)
        self.num_bytes -= count
        return count


class LocalHandler(BaseHTTPRequestHandler, ABC):
    """Checks the requests of one connection. A subclass answers valid ones (`answer`)."""

    PATHS: ClassVar[dict[str, tuple[str, ...]]]  # path -> methods
    server: LocalServer
    protocol_version = "HTTP/1.1"
    default_request_version = "HTTP/1.0"  # of requests without a valid version; the default, 0.9, has no headers

    @abstractmethod
    def answer(self, path: str, body: bytes) -> None:
        """Send the response to a valid request."""

    def setup(self) -> None:
        super().setup()
        self.rfile.close()
        self.reader = RequestReader(self.connection)
        self.rfile = io.BufferedReader(self.reader)

    def handle_one_request(self) -> None:
        self.has_unread_body = True  # until the headers are read
        self.requestline, self.request_version, self.command = "", self.default_request_version, ""
        self.reader.allow(self.server.limits.head_bytes, self.server.limits.receive_seconds)
        try:
            super().handle_one_request()  # closes the connection on a TimeoutError
        except http.client.HTTPException:
            self.send_error(HTTPStatus.REQUEST_URI_TOO_LONG, "The request line is too long")

    def handle_expect_100(self) -> bool:
        return True  # `read_body` asks for the body after the checks

    def do_GET(self) -> None:
        """Check a request whose line and headers are read, and answer it."""
        if self.request_version < "HTTP/1.1":
            self.close_connection = True
        try:
            length = self.body_length()
            self.check_origin()
            path = self.path.partition("?")[0]
            if path not in self.PATHS:
                raise RequestError(HTTPStatus.NOT_FOUND, f"There is no {path}. Use one of {', '.join(self.PATHS)}.")
            if self.command not in self.PATHS[path]:
                message = f"{path} does not support {self.command}. Use {' or '.join(self.PATHS[path])}."
                raise RequestError(HTTPStatus.METHOD_NOT_ALLOWED, message)
            self.answer(path, self.read_body(length) if self.command == "POST" else b"")
        except RequestError as error:
            self.send_json(error.status, error.body())

    do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_GET

    def body_length(self) -> int | None:
        """Return the length of the body, or None if the headers do not say. RequestError if they are ambiguous."""
        if self.headers.defects or self.headers.get_payload():
            raise RequestError(HTTPStatus.BAD_REQUEST, "A header line is invalid. Use NAME: VALUE.")
        if "Transfer-Encoding" in self.headers:
            message = "Transfer-Encoding is not supported. Send the length of the body as Content-Length."
            raise RequestError(HTTPStatus.NOT_IMPLEMENTED, message)
        lengths = self.headers.get_all("Content-Length", [])
        if len(set(lengths)) > 1 or not all(re.fullmatch("[0-9]{1,18}", length) for length in lengths):
            message = f"Content-Length {', '.join(lengths)!r:.50} is invalid. Use the number of bytes of the body."
            raise RequestError(HTTPStatus.BAD_REQUEST, message)
        self.has_unread_body = bool(lengths) and int(lengths[0]) > 0
        return int(lengths[0]) if lengths else None

    def check_origin(self) -> None:
        """Refuse requests that another website may have caused."""
        for header, known, is_required in (("Host", self.server.hosts, True), ("Origin", self.server.origins, False)):
            values = self.headers.get_all(header, [])
            if len(values) > 1 or len(values) < is_required or any(value.lower() not in known for value in values):
                message = f"{header} {', '.join(values)!r:.100} is not allowed. Use {' or '.join(sorted(known))}."
                raise RequestError(HTTPStatus.FORBIDDEN, message)

    def read_body(self, length: int | None) -> bytes:
        limits = self.server.limits
        if length is None:
            raise RequestError(HTTPStatus.LENGTH_REQUIRED, "The request has no Content-Length. Send one.")
        if length > limits.body_bytes:
            message = f"The body has {length:,} bytes. Use at most {limits.body_bytes:,}."
            raise RequestError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, message)
        if self.headers.get("Expect", "").lower() == "100-continue":
            self.send_response_only(HTTPStatus.CONTINUE)
            self.end_headers()
        self.reader.allow(length, limits.receive_seconds)
        try:
            body = self.rfile.read(length)
        except TimeoutError:
            message = f"The body was not received within {limits.receive_seconds:g} seconds. Send it faster."
            raise RequestError(HTTPStatus.REQUEST_TIMEOUT, message) from None
        if len(body) < length:
            raise ConnectionAbortedError
        self.has_unread_body = False
        return body

    def is_disconnected(self) -> bool:
        """Return whether the client has closed the connection, or its sending half."""
        try:
            self.connection.settimeout(0)
            return not self.connection.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Send an error that the base class has found in the request line or the headers."""
        error = RequestError(HTTPStatus(code), f"{message or HTTPStatus(code).phrase}.")
        self.send_json(error.status, error.body())

    def send_json(self, status: HTTPStatus, content: dict[str, Any]) -> None:
        headers = {}
        if status == HTTPStatus.SERVICE_UNAVAILABLE:
            headers["Retry-After"] = str(RETRY_SECONDS)
        if status == HTTPStatus.METHOD_NOT_ALLOWED:
            headers["Allow"] = ", ".join(self.PATHS[self.path.partition("?")[0]])
        self.send(status, json.dumps(content).encode(), "application/json", headers)

    def send(self, status: HTTPStatus, body: bytes, content_type: str, headers: dict[str, str] | None = None) -> None:
        # an unread body would be taken for the next request
        closing = {"Connection": "close"} if self.has_unread_body or self.close_connection else {}
        self.start_response(status, content_type, {"Content-Length": str(len(body)), **closing, **(headers or {})})
        if self.command != "HEAD":
            self.write(body)

    def start_response(self, status: HTTPStatus, content_type: str, headers: dict[str, str]) -> None:
        self.connection.settimeout(self.server.limits.send_seconds)
        self.send_response(status)
        for name, value in {"Content-Type": content_type, **self.server.response_headers, **headers}.items():
            self.send_header(name, value)  # Connection: close also sets close_connection
        self.end_headers()

    def write(self, data: bytes) -> None:
        """Send data. TimeoutError if the client does not receive it."""
        self.connection.settimeout(self.server.limits.send_seconds)
        self.wfile.write(data)

    def version_string(self) -> str:
        return "BabyGPT"

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing."""
