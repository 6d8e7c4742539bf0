"""A local S3 server for tests, and pages to prepare small datasets from."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
import pytest
from moto.server import ThreadedMotoServer

from support.helpers import save_jsonl

TEXTS = [f"Page {i}: " + "a few words and more, " * (i % 13) for i in range(200)]


@contextmanager
def s3_server() -> Iterator[list[tuple[str, str]]]:
    """Run a server, set its address and keys in the environment, and yield its requests, (method, path) each."""
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    requests, app = [], server._server.app

    def record_request(environ, start_response):
        requests.append((environ["REQUEST_METHOD"], environ["PATH_INFO"]))
        return app(environ, start_response)

    server._server.app = record_request
    host, port = server.get_host_and_port()
    variables = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1", "no_proxy": "*",
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        fsspec.get_filesystem_class("s3").clear_instance_cache()  # an instance has the address of its server
        yield requests
    server.stop()


def save_pages(directory: Path, extension: str) -> Path:
    """Write TEXTS into files of 20 pages."""
    for i in range(0, len(TEXTS), 20):
        save_jsonl(directory / f"{i:03d}.{extension}", TEXTS[i : i + 20])
    return directory


def snapshot(directory: Path) -> dict[str, bytes]:
    """Return the bytes of each file of a directory, by name."""
    return {path.name: path.read_bytes() for path in directory.iterdir()}
