"""Killed preparations: nothing is lost, no worker remains, and only one process prepares a directory at a time."""

import contextlib
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.preparation import prepare, snapshot, start
from support.runs import ROOT

from babygpt.errors import UserError


@pytest.fixture(scope="module")
def long_pages(tmp_path_factory) -> Path:
    """Parquet files that take about a second to prepare."""
    directory, rng = tmp_path_factory.mktemp("long_pages"), random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=5)) for _ in range(2000)]
    for i in range(40):
        texts = [" ".join(rng.choices(words, k=100)) for _ in range(300)]
        pq.write_table(pa.table({"text": texts}), directory / f"{i}.parquet")
    return directory


def wait_until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def count_files(directory: Path) -> int:
    return sum(len(files) for _, _, files in os.walk(directory))


def kill_group(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def test_repeated_kills_change_no_byte(tmp_path, long_pages):
    prepare(tmp_path / "uninterrupted" / "d", long_pages, workers=2)
    directory, rng, kills = tmp_path / "d", random.Random(0), 0
    while True:
        target = count_files(directory) + 4
        process = start(directory, long_pages, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_until(
            lambda process=process, target=target: process.poll() is not None or count_files(directory) >= target
        )
        time.sleep(rng.uniform(0, 0.03))
        kill_group(process)
        if process.wait() == 0:
            break
        assert process.returncode == -signal.SIGKILL
        kills += 1
    assert kills >= 2
    assert snapshot(directory) == snapshot(tmp_path / "uninterrupted" / "d")


def test_killed_preparation_leaves_no_worker(tmp_path, long_pages):
    process = start(tmp_path / "d", long_pages, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        wait_until(lambda: list((tmp_path / "d").glob("parts/*.bin*")))
        process.kill()
        process.communicate(timeout=5)  # returns when no process has the other end of the pipe open
    finally:
        kill_group(process)


def test_killed_worker_is_reported_and_finished_tasks_are_kept(tmp_path, long_pages):
    with ThreadPoolExecutor() as thread:
        running = thread.submit(prepare, tmp_path / "d", long_pages, workers=2)
        wait_until(lambda: list((tmp_path / "d").glob("parts/*.npz")))
        multiprocessing.active_children()[0].kill()
        with pytest.raises(UserError, match=r"(?s)worker was killed.*kept.*--workers"):
            running.result()
    assert list((tmp_path / "d").glob("parts/*.npz"))


def test_second_interrupt_kills_the_workers():
    """After the first Ctrl-C the pool waits for the running task; a second one kills it, and no process remains."""
    program = """
import signal
import time
from babygpt.data.tokenizer import load_tokenizer
from babygpt.data.workers import Setup, local_workers

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores SIGINT
with local_workers(1, Setup(load_tokenizer("gpt2"))) as pool:
    task = pool.submit(time.sleep, 300)
    while not task.running():
        time.sleep(0.01)
    print("running", flush=True)
    task.result()
"""
    command = [sys.executable, "-c", program]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        assert process.stdout.readline() == b"running\n"
        process.send_signal(signal.SIGINT)
        time.sleep(2)
        assert process.poll() is None, "the pool waits for the task"
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)
        with pytest.raises(ProcessLookupError):
            wait_until(lambda: os.killpg(process.pid, 0))  # raises once the last process of the group has exited
    finally:
        kill_group(process)


def test_second_preparation_of_a_directory_is_rejected(tmp_path, long_pages):
    first = start(tmp_path / "d", long_pages, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: list((tmp_path / "d").glob("parts/*.npz")))
        with pytest.raises(UserError, match=r"Another fineweb\.py process is preparing"):
            prepare(tmp_path / "d", long_pages, workers=1)
    finally:
        kill_group(first)
        first.wait()
