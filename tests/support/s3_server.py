"""An S3 server on this machine for tests, and a small set of pages to make data sets of."""

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
    """Yields the requests, (method, path) each. Address and keys are in the environment, as on a user's machine."""
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    requests, answer = [], server._server.app

    def note(environ, begin):
        requests.append((environ["REQUEST_METHOD"], environ["PATH_INFO"]))
        return answer(environ, begin)

    server._server.app = note
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1", "no_proxy": "*",
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        fsspec.get_filesystem_class("s3").clear_instance_cache()  # of another server's address
        yield requests
    server.stop()


def save_pages(folder: Path, ending: str) -> Path:
    """TEXTS in files of twenty."""
    for i in range(0, len(TEXTS), 20):
        save_jsonl(folder / f"{i:03d}.{ending}", TEXTS[i : i + 20])
    return folder


def snapshot(folder: Path) -> dict[str, bytes]:
    """All files of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}
