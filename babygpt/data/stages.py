"""The two stages of data preparation that run in a pool of workers: tokenize and write."""

import json
import sys
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from itertools import takewhile
from typing import Any

from tqdm import tqdm

from babygpt import files
from babygpt.data.plan import SPLIT_DECISIONS, Plan, load_index, plan_shards
from babygpt.data.shards import shard_name
from babygpt.data.sources import Source
from babygpt.data.tasks import Task
from babygpt.data.workers import Pool, tokenize_task, write_task
from babygpt.data.workspace import Workspace
from babygpt.errors import UserError
from babygpt.files import write_json


class TaskQueue:
    """Tasks submitted to a pool, at most `max_running` at once. `on_done(key, result)` is called after each task."""

    def __init__(self, pool: Pool, on_done: Callable[[Any, Any], None], max_running: int | None = None):
        self.pool, self.on_done, self.max_running = pool, on_done, max_running or max(8, 2 * pool.workers)
        self.running: dict[Future, Any] = {}  # future -> key

    def submit(self, key: Any, function: Callable, *arguments: Any) -> None:
        self.running[self.pool.submit(function, *arguments)] = key

    def is_full(self) -> bool:
        return len(self.running) >= self.max_running

    def wait_while(self, condition: Callable[[], object]) -> None:
        """Handle tasks as they finish, until `condition` is false."""
        while condition():
            for future in wait(self.running, return_when=FIRST_COMPLETED).done:
                self.on_done(self.running.pop(future), future.result())


def tokenize(source: Source, work: Workspace, pool: Pool, max_tokens: int | None) -> tuple[list[str], int]:
    """Tokenize a source until `max_tokens` are reached.

    Returns the parts (paths without suffix) in source order, and how many of them are from its validation units.
    """
    stage = TokenizeStage(source, work, pool, max_tokens)
    stems = stage.run()
    num_val_tasks = sum(count for unit, count in stage.num_tasks.items() if unit < source.num_val_units)
    return stems, min(num_val_tasks, len(stems))  # max_tokens may end the stage before all tasks


class TokenizeStage:
    """The tokenize stage. It submits tasks in source order and fetches units ahead as far as the source allows."""

    def __init__(self, source: Source, work: Workspace, pool: Pool, max_tokens: int | None):
        self.source, self.parts, self.max_tokens = source, work.parts, max_tokens
        self.queue = TaskQueue(pool, self.on_done, None if max_tokens else 4096)  # keeps workers busy during downloads
        self.downloads = f"{work.parts if pool.is_cluster else work.scratch}/download"
        self.buckets = work.scratch / "buckets"
        self.earlier = set(files.list_names(work.parts))  # files that an earlier run wrote
        self.stems: list[str] = []  # parts of all tasks up to now, in source order
        self.finished: set[str] = set()  # parts of finished tasks
        self.messages: set[str] = set()
        self.num_tasks: dict[int, int] = {}  # of each fetched unit
        self.unfinished: dict[int, int] = {}  # unfinished tasks of each open unit
        self.documents = self.tokens = self.earlier_tokens = 0
        self.reached = False  # whether the finished tasks have reached max_tokens
        self.next_plan = max_tokens or 0  # tokens at which `max_tokens_reached` plans again
        total_bytes = sum(unit.bytes for unit in source.units)
        self.bar = tqdm(total=total_bytes or None, unit="B", unit_scale=True, desc="tokenize", smoothing=0.05)

    def run(self) -> list[str]:
        with self.bar:
            for unit in range(len(self.source.units)):
                self.queue.wait_while(self.must_wait_for_units)
                if self.max_tokens_reached():
                    break
                self.run_unit(unit)
            self.queue.wait_while(lambda: self.queue.running)
        return self.stems

    def must_wait_for_units(self) -> bool:
        """Return whether the maximum number of units is open and tasks are still running."""
        return len(self.unfinished) >= self.source.max_open_units and bool(self.queue.running)

    def run_unit(self, unit: int) -> None:
        """Submit the unfinished tasks of a unit."""
        for number, task in enumerate(self.fetch(unit)):
            self.queue.wait_while(self.queue.is_full)
            if self.max_tokens_reached():
                break
            stem = f"{self.parts}/{unit:05d}-{number:05d}"
            self.stems.append(stem)
            if f"{unit:05d}-{number:05d}.npz" in self.earlier:
                tokens = load_index(stem)["tokens"]
                self.earlier_tokens += int(tokens.sum())
                self.on_done((unit, stem), (len(tokens), int(tokens.sum()), None))
            elif task is None:
                raise UserError(
                    f"{stem}.npz is missing, but {unit:05d}.json records it as finished. Delete {self.parts} to start "
                    "over."
                )
            else:
                self.queue.submit((unit, stem), tokenize_task, task, stem)

    def fetch(self, unit: int) -> list[Task | None]:
        """Return the tasks of a unit. If an earlier run finished them all, return None for each and fetch nothing."""
        if f"{unit:05d}.json" in self.earlier:
            tasks: list[Task | None] = [None] * json.loads(files.read_bytes(f"{self.parts}/{unit:05d}.json"))["tasks"]
        else:
            tasks = [*self.source.fetch(unit, self.downloads)]
        self.num_tasks[unit] = self.unfinished[unit] = len(tasks)
        self.close_if_finished(unit)  # a file without rows has no tasks
        return tasks

    def on_done(self, key: tuple[int, str], result: tuple[int, int, str | None]) -> None:
        """Count a finished task, print its message once, and update the progress bar."""
        (unit, stem), (documents, tokens, message) = key, result
        if message and message not in self.messages:
            self.messages.add(message)
            self.bar.write(message, file=sys.stderr)
        self.finished.add(stem)
        self.documents += documents
        self.tokens += tokens
        self.unfinished[unit] -= 1
        self.close_if_finished(unit)
        self.bar.update(self.source.units[unit].bytes // self.num_tasks[unit])
        rate = (self.tokens - self.earlier_tokens) / max(self.bar.format_dict["elapsed"], 1e-3)
        self.bar.set_postfix_str(f"{self.documents:,} documents, {self.tokens:,} tokens, {rate:,.0f} tokens/s")

    def close_if_finished(self, unit: int) -> None:
        """Record a unit whose tasks are finished, and delete its download."""
        if self.unfinished[unit] == 0:
            if f"{unit:05d}.json" not in self.earlier:
                write_json(f"{self.parts}/{unit:05d}.json", {"tasks": self.num_tasks[unit]})
            self.source.release(unit, self.downloads)
            del self.unfinished[unit]

    def max_tokens_reached(self) -> bool:
        """Return whether the tasks before the first unfinished one have `max_tokens` tokens, without duplicates."""
        if self.reached or self.max_tokens is None or self.tokens < self.next_plan:
            return self.reached
        parts = list(takewhile(self.finished.__contains__, self.stems))
        kept = sum(plan_shards(parts, 0, None, self.buckets).tokens.values())
        # at most about 50 times, since a plan reads all indexes
        self.next_plan = self.tokens + max(self.max_tokens - kept, self.max_tokens // 50)
        self.reached = kept >= self.max_tokens
        return self.reached


def list_shards(plan: Plan, shard_tokens: int) -> list[tuple[int, tuple[str, int]]]:
    """Return (number, (split, first token)) of each shard. Training shards are numbered from 1, as in llm.c."""
    val, train = ([(split, start) for start in range(0, plan.tokens[split], shard_tokens)] for split in SPLIT_DECISIONS)
    return [*enumerate(val), *enumerate(train, max(len(val), 1))]


def write_shards(plan: Plan, work: Workspace, pool: Pool, shard_tokens: int, vocab_size: int) -> list[dict[str, Any]]:
    """Write the shards that an earlier run did not finish; return every shard's entry in dataset.json."""
    shards = list_shards(plan, shard_tokens)
    existing, recorded = files.list_names(work.directory), files.list_names(work.parts)
    entries = []
    with tqdm(total=len(shards), desc="write", unit="shard") as bar:
        queue = TaskQueue(pool, lambda key, result: bar.update())
        for number, (split, start) in shards:
            name, stop = shard_name(work.name, split, number), min(start + shard_tokens, plan.tokens[split])
            entries.append({"file": name, "tokens": stop - start})
            if name in existing and f"{name}.json" in recorded:
                bar.update()
                continue
            queue.wait_while(queue.is_full)  # a task takes one byte of memory per document of its parts
            task = (f"{work.directory}/{name}", plan.pieces(split, start, stop), stop - start, vocab_size)
            queue.submit(name, write_task, *task, f"{work.parts}/{name}.json")
        queue.wait_while(lambda: queue.running)
    return [entry | json.loads(files.read_bytes(f"{work.parts}/{entry['file']}.json")) for entry in entries]
