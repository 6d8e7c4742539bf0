"""Prepare small datasets with fineweb.py."""

import subprocess
import sys
from pathlib import Path
from unittest import mock

import xxhash

import fineweb
from babygpt.data import tasks, texts
from babygpt.data.shards import read_manifest
from support.helpers import call


def prepare(out_dir: Path, *inputs: Path, source="files", task_bytes=500, workers=1, **options) -> dict:
    """Run `fineweb.py files --input ... --out-dir ...` in this process, with small tasks, and return the manifest."""
    arguments = [source, *(["--input", *inputs] if inputs else []), "--out-dir", out_dir, "--workers", workers]
    for name, value in options.items():
        arguments += [f"--{name.replace('_', '-')}", value]
    with mock.patch.object(tasks, "TASK_BYTES", task_bytes):
        call(fineweb.main, *arguments)
    return read_manifest(out_dir)


def start(out_dir: Path, *inputs: Path, workers=2, **streams) -> subprocess.Popen:
    """Start the same command in another process, which has its own process group."""
    command = [sys.executable, fineweb.__file__, "files", "--input", *inputs, "--out-dir", out_dir]
    return subprocess.Popen([*map(str, command), "--workers", str(workers)], start_new_session=True, **streams)


def snapshot(directory: Path) -> dict[str, bytes]:
    """Return the bytes of each file below a directory, by relative path."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def hash_text(text: str) -> bytes:
    """Return the hash by which documents are compared and validation documents are chosen."""
    return xxhash.xxh3_128_digest(texts.without_surrogates(text).encode())
