"""The stages of data preparation that run in a process pool: tokenize, and write, one shard per task."""

import json
import sys
from concurrent.futures import FIRST_COMPLETED, Future, wait
from itertools import takewhile
from pathlib import Path

from babygpt import files
from babygpt.data.plan import CODES, Plan, load_index, plan
from babygpt.data.readers import Task
from babygpt.data.shards import shard_name
from babygpt.data.sources import Source
from babygpt.data.workers import Pool, map_task, write_task
from babygpt.data.workspace import dataset_name
from babygpt.errors import UserError
from babygpt.files import write_json


class MapStage:
    """Runs the map tasks of a source in a pool, in source order, fetching units ahead as far as the source allows."""

    def __init__(self, source: Source, parts: str, downloads: str, buckets: Path, pool: Pool, max_tokens: int | None):
        from tqdm import tqdm

        self.source, self.parts, self.pool, self.max_tokens = source, parts, pool, max_tokens
        self.downloads, self.buckets = downloads, buckets  # folders for files of the source, and for the plan
        self.there = set(files.names(parts))  # what an earlier run had done
        self.stems: list[str] = []  # of all tasks begun, in source order
        self.finished: set[str] = set()
        self.told: set[str] = set()  # messages
        self.running: dict[Future, tuple[int, str]] = {}  # future -> unit, stem
        self.tasks: dict[int, int] = {}  # unit -> its tasks
        self.left: dict[int, int] = {}  # unit that is fetched -> its tasks that are not done
        self.documents = self.tokens = self.found = 0  # `found`: tokens that an earlier run had done
        self.look_again_at = max_tokens or 0  # tokens at which max_tokens may be reached
        size = sum(unit.bytes for unit in source.units)
        self.bar = tqdm(total=size or None, unit="B", unit_scale=True, desc="map", smoothing=0.05)

    def run(self, ahead: int) -> list[str]:
        """Does all tasks that aren't done yet, `ahead` at once; returns the stems of all, in source order."""
        for unit in range(len(self.source.units)):
            while len(self.left) >= self.source.units_at_once:
                self.reap()
            if self.enough():
                break
            for number, task in enumerate(self.fetch(unit)):
                while len(self.running) >= ahead:
                    self.reap()
                if self.enough():
                    break
                stem = f"{self.parts}/{unit:05d}-{number:05d}"
                self.stems.append(stem)
                if f"{unit:05d}-{number:05d}.npz" in self.there:
                    tokens = load_index(stem)["tokens"]
                    self.found += int(tokens.sum())
                    self.done(unit, stem, len(tokens), int(tokens.sum()))
                elif task is None:
                    raise UserError(f"{stem}.npz is missing, but {unit:05d}.json lists it. Delete {self.parts}.")
                else:
                    self.running[self.pool.submit(map_task, task, stem)] = unit, stem
        while self.running:
            self.reap()
        self.bar.close()
        return self.stems

    def fetch(self, unit: int) -> list[Task | None]:
        """Return the tasks of a unit, or None for each if all are done: then its file is not needed again."""
        tasks: list[Task | None]
        if f"{unit:05d}.json" in self.there:
            tasks = [None] * json.loads(files.read_bytes(f"{self.parts}/{unit:05d}.json"))["tasks"]
        else:
            tasks = [*self.source.fetch(unit, self.downloads)]
        self.tasks[unit] = self.left[unit] = len(tasks)
        self.close_if_done(unit)  # a file may have no rows
        return tasks

    def reap(self) -> None:
        for future in wait(self.running, return_when=FIRST_COMPLETED).done:
            self.done(*self.running.pop(future), *future.result())

    def done(self, unit: int, stem: str, documents: int, tokens: int, message: str | None = None) -> None:
        """Counts a finished task."""
        if message and message not in self.told:
            self.told.add(message)
            self.bar.write(message, file=sys.stderr)
        self.finished.add(stem)
        self.documents += documents
        self.tokens += tokens
        self.left[unit] -= 1
        self.close_if_done(unit)
        self.bar.update(self.source.units[unit].bytes // self.tasks[unit])
        rate = (self.tokens - self.found) / max(self.bar.format_dict["elapsed"], 1e-3)
        self.bar.set_postfix_str(f"{self.documents:,} documents, {self.tokens:,} tokens, {rate:,.0f} tokens/s")

    def close_if_done(self, unit: int) -> None:
        if self.left[unit] == 0:
            if f"{unit:05d}.json" not in self.there:
                write_json(f"{self.parts}/{unit:05d}.json", {"tasks": self.tasks[unit]})
            self.source.release(unit, self.downloads)
            del self.left[unit]

    def enough(self) -> bool:
        """Whether the finished tasks before the first unfinished one hold max_tokens without their doubles."""
        if self.max_tokens is None or self.tokens < self.look_again_at:
            return False
        done = list(takewhile(self.finished.__contains__, self.stems))
        kept = sum(plan(done, 0, None, self.buckets).tokens.values())
        self.look_again_at = self.tokens + max(self.max_tokens - kept, self.max_tokens // 50)  # a look reads all
        return kept >= self.max_tokens


def write_shards(placed: Plan, folder: str, pool: Pool, ahead: int, shard_tokens: int, vocab_size: int) -> list[dict]:
    """Writes all shards that aren't there yet, `ahead` at once; returns their rows of the manifest."""
    from tqdm import tqdm

    there, recorded = set(files.names(folder)), set(files.names(f"{folder}/parts"))
    rows: list[dict] = []
    running: set[Future] = set()
    number = 0
    bar = tqdm(total=sum(-(-count // shard_tokens) for count in placed.tokens.values()), desc="write", unit="shard")

    def reap() -> None:
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            running.remove(future)
            future.result()
            bar.update()

    for split in CODES:
        number = max(number, 1) if split == "train" else 0  # llm.c's numbers: training begins at 1
        for begin in range(0, placed.tokens[split], shard_tokens):
            end = min(begin + shard_tokens, placed.tokens[split])
            name = shard_name(dataset_name(folder), split, number)
            rows.append({"file": name, "tokens": end - begin})
            number += 1
            if name in there and f"{name}.json" in recorded:
                bar.update()
                continue
            while len(running) >= ahead:  # each holds what becomes of all documents of its parts
                reap()
            task = (f"{folder}/{name}", placed.pieces(split, begin, end), end - begin, vocab_size)
            running.add(pool.submit(write_task, *task, f"{folder}/parts/{name}.json"))
    while running:
        reap()
    bar.close()
    return [row | json.loads(files.read_bytes(f"{folder}/parts/{row['file']}.json")) for row in rows]
