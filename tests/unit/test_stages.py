"""The tokenize stage: how much of a source it reads for --max-tokens."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from babygpt.data import stages
from babygpt.data.filters import KEPT
from babygpt.data.sources import Unit
from babygpt.data.tasks import Task
from babygpt.data.workers import Pool

TASKS, TOKENS = 40, 1000  # tasks per unit, tokens per task


class Source:
    """Six units with many tasks each. Two may be open at once, as for files from the hub."""

    units = [Unit(f"unit {i}", 1000) for i in range(6)]  # noqa: RUF012
    max_open_units, num_val_units = 2, 0

    def __init__(self) -> None:
        self.fetched: list[int] = []

    def fetch(self, unit: int, downloads: str) -> list[Task]:
        self.fetched.append(unit)
        return [Task("files", (str(unit), str(i)), ("text",)) for i in range(TASKS)]

    def release(self, unit: int, downloads: str) -> None: ...


def write_index(task: Task, stem: str) -> tuple[int, int, None]:
    """Write the index of a task with ten distinct documents."""
    ids = np.arange(10, dtype=np.uint64) + np.uint64(10 * (TASKS * int(task.location[0]) + int(task.location[1])))
    np.savez(
        f"{stem}.npz", hash=np.stack([ids, ids], axis=1), tokens=np.full(10, TOKENS // 10, np.uint32),
        bytes=np.full(10, 5, np.uint64), decision=np.full(10, KEPT, np.uint8),
    )  # fmt: skip
    return 10, TOKENS, None


@pytest.mark.parametrize("max_tokens", [1, TOKENS * TASKS // 2, TOKENS * TASKS, int(TOKENS * TASKS * 2.5)])
def test_tokenize_stage_stops_at_max_tokens(max_tokens, tmp_path, monkeypatch):
    """The stage returns although units are unfinished, and fetches at most one unit more than it needs."""
    monkeypatch.setattr(stages, "tokenize_task", write_index)
    work, source, parts = SimpleNamespace(parts=str(tmp_path), scratch=tmp_path), Source(), []

    def run() -> None:
        with ThreadPoolExecutor(1) as threads:  # one thread: tasks finish in order, so their number is known
            parts.extend(stages.tokenize(source, work, Pool(threads.submit, 2), max_tokens)[0])

    thread = threading.Thread(target=run, daemon=True)  # pytest can exit even if a daemon thread hangs
    thread.start()
    thread.join(30)
    assert not thread.is_alive(), "the stage hangs"
    needed = -(-max_tokens // TOKENS)
    assert needed <= len(parts) <= needed + 8, "up to 8 tasks are in flight"
    assert len(source.fetched) <= -(-needed // TASKS) + 1
    assert len(list(Path(tmp_path).glob("*.npz"))) == len(parts)
