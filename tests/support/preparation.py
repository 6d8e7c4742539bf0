"""Preparations of small data sets."""

import subprocess
import sys
from pathlib import Path
from unittest import mock

import fineweb
from babygpt.data import readers
from babygpt.data.shards import read_manifest
from support.helpers import call


def prepare(out_dir: Path, *inputs: Path, source="files", task_bytes=500, workers=1, **options) -> dict:
    """`python fineweb.py files --input ... --out-dir ...` in this process, with small tasks; returns the manifest."""
    arguments = [source, *(["--input", *inputs] if inputs else []), "--out-dir", out_dir, "--workers", workers]
    for name, value in options.items():
        arguments += [f"--{name.replace('_', '-')}", value]
    with mock.patch.object(readers, "TASK_BYTES", task_bytes):
        call(fineweb.main, *arguments)
    return read_manifest(out_dir)


def start(out_dir: Path, *inputs: Path, workers=2, **streams) -> subprocess.Popen:
    """The same as a command of its own, in a process group of its own."""
    command = [sys.executable, fineweb.__file__, "files", "--input", *inputs, "--out-dir", out_dir]
    return subprocess.Popen([*map(str, command), "--workers", str(workers)], start_new_session=True, **streams)


def snapshot(folder: Path) -> dict[str, bytes]:
    """The files of a folder by their path in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
