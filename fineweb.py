#!/usr/bin/env python
"""Raw text to a data set of token shards, from the hub or from files. A killed run goes on where it was.

    python fineweb.py                                        # FineWeb-Edu 10BT into data/fineweb-edu-10BT
    python fineweb.py fineweb2-pl --tokenizer data/pl.json   # or fineweb-10BT, wikipedia-en, stdlib, OWNER/NAME
    python fineweb.py files --input 'pages/*.jsonl.gz' --out-dir data/pages
    python fineweb.py fineweb-edu-100BT --min-score 3.5 --out-dir s3://bucket/edu
    python fineweb.py verify data/pages

Three stages. Map: workers read, filter, encode and index tasks that the source fixes. Plan: from the indexes alone,
drop doubles, split train from validation by document, and place every document. Write: a worker a shard.
Each task is committed whole or not at all, so the bytes follow from source and settings, not from the workers.
"""

import errno
import fcntl
import json
import os
import re
import sys
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import asdict
from itertools import takewhile
from pathlib import Path
from typing import Literal

from babygpt import files
from babygpt.data.filters import Filters
from babygpt.data.plan import CODES, Plan, load_index, plan
from babygpt.data.quality import QualityModel, check
from babygpt.data.readers import Task
from babygpt.data.resources import check_room
from babygpt.data.shards import MANIFEST, open_dataset, read_manifest, shard_name, verify
from babygpt.data.sources import Source, find
from babygpt.data.tokenizer import Tokenizer, load_tokenizer
from babygpt.data.workers import Setup, local_workers, map_task, ray_workers, warm_up, write_task
from babygpt.errors import UserError, run
from babygpt.files import write_json

FORMAT = 2  # of parts/: another one where tasks, hashes or indexes change


# ---------------------------------------------------------------------------------------------------------
# map: text to tokens and an index, a task at a time


class MapStage:
    """Runs the map tasks of a source in a pool, in source order, fetching units ahead as far as the source allows."""

    def __init__(
        self, source: Source, parts: str, downloads: str, buckets: Path, pool: Executor, max_tokens: int | None
    ):
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
                else:
                    self.running[self.pool.submit(map_task, task, stem)] = unit, stem
        while self.running:
            self.reap()
        self.bar.close()
        return self.stems

    def fetch(self, unit: int) -> list[Task | None]:
        if f"{unit:05d}.json" in self.there:  # all its tasks are done: the file need not be here again
            tasks = [None] * json.loads(files.read_bytes(f"{self.parts}/{unit:05d}.json"))["tasks"]
        else:
            tasks = self.source.fetch(unit, self.downloads)
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


# ---------------------------------------------------------------------------------------------------------
# write: a task a shard


def write_shards(
    placed: Plan, folder: str, pool: Executor, ahead: int, shard_tokens: int, vocab_size: int
) -> list[dict]:
    """Writes all shards that aren't there yet, `ahead` at once; returns their rows of the manifest."""
    from tqdm import tqdm

    there, recorded = set(files.names(folder)), set(files.names(f"{folder}/parts"))
    rows, running, number = [], set(), 0
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
            name = shard_name(_name(folder), split, number)
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


# ---------------------------------------------------------------------------------------------------------
# the three together


def prepare(
    source: Source, folder: str, settings: dict, setup: Setup, workers: int | None, ray_address: str | None
) -> dict:
    """Runs map, plan and write, going on where an earlier run of the same settings stopped; returns the manifest."""
    tokenizer, parts = setup.tokenizer, f"{folder}/parts"
    here = files.cache(folder)
    scratch = here / "parts"  # what only this machine needs
    if (manifest := _finished(source, folder, settings)) is not None:
        _tidy(parts, scratch)  # of a run killed in its last breath
        print(f"{folder} is complete already.")
        return manifest
    _open(source, folder, settings)
    if ray_address is None:
        workers = check_room(source, settings, folder, workers, tokenizer.vocab_size)
    begun = {"format": FORMAT} | settings | {"revision": source.revision}
    _clean(here)
    if not files.is_remote(folder):
        os.makedirs(parts, exist_ok=True)
    write_json(f"{parts}/settings.json", begun)

    # other machines need what is downloaded too
    downloads = f"{parts if ray_address else scratch}/download"
    engine = local_workers(workers, setup) if ray_address is None else ray_workers(ray_address, setup)
    with _failures_told(), engine as (pool, count):
        max_tokens, wanted = settings["max_tokens"], settings["val_tokens"]
        stage = MapStage(source, parts, downloads, scratch / "buckets", pool, max_tokens)
        stems = stage.run(ahead=max(8, 2 * count) if max_tokens else 4096)
        placed = plan(stems, wanted, max_tokens, scratch / "buckets") if stems else None
        if placed is None or placed.documents["kept"] == 0:
            filtered = " that the filters leave" if placed and placed.documents["filtered"] else ""
            where = f"in its {len(source.units):,} files or batches"
            raise UserError(f"the source {source.name} has no text{filtered} {where}.")
        if wanted and placed.tokens["val"] > 2 * wanted:
            print(f"warning: {placed.tokens['val']:,} tokens validate, as documents stay whole and some are large.")
        print("plan: " + ", ".join(f"{count:,} {what}" for what, count in placed.documents.items()))
        shards = write_shards(placed, folder, pool, max(8, 2 * count), settings["shard_tokens"], tokenizer.vocab_size)

    beside = f"{folder}/{_tokenizer_file(tokenizer)}"
    if not (files.exists(beside) and files.read_bytes(beside) == tokenizer.data):
        with files.create(beside) as file:
            file.write(tokenizer.data)
    if json.loads(files.read_bytes(f"{parts}/settings.json")) != begun:
        raise UserError(f"another fineweb.py with other settings writes to {folder}. Give each its own --out-dir.")
    counts = {"documents": placed.documents, "tokens": placed.tokens, "text_bytes": placed.bytes}
    manifest = {
        "format": 1,
        "name": _name(folder),
        "settings": settings | {"revision": source.revision},
        "tokenizer": {"name": tokenizer.name, "file": _tokenizer_file(tokenizer), "sha256": tokenizer.sha256},
        "eot_id": tokenizer.eot_id,
        "vocab_size": tokenizer.vocab_size,
        "split_rule": "by document: the smallest xxh3-128 hashes of the text validate",
        "counts": counts | {"filtered_by": placed.filtered_by},
        "shards": shards,
    }
    write_json(f"{folder}/{MANIFEST}", manifest)
    _tidy(parts, scratch)
    return manifest


def _tidy(parts: str, scratch: Path) -> None:
    for left in {parts, str(scratch)}:
        files.remove(left)


def _finished(source: Source, folder: str, settings: dict) -> dict | None:
    """The manifest of a finished data set; UserError where it is of other settings."""
    manifest = read_manifest(folder)
    if manifest is None:
        return None
    if not source.downloads:  # what is here can be looked at again, the hub need not be asked
        source.open()
        settings = settings | {"revision": source.revision}
    _same_settings(manifest["settings"], settings, folder, "holds a finished data set made")
    there = set(files.names(folder))
    if lost := [shard["file"] for shard in manifest["shards"] if shard["file"] not in there]:
        raise UserError(f"{folder} has lost {', '.join(lost)}. Copy it there, or delete {MANIFEST} and the shards.")
    return manifest


def _open(source: Source, folder: str, settings: dict) -> None:
    """Opens the source, in the revision that an earlier run of the folder had; UserError where that can't go on."""
    names = files.names(f"{folder}/parts")
    if "settings.json" in names and any(re.fullmatch(r"\d{5}(-\d{5}\.npz|\.json)", name) for name in names):
        earlier = json.loads(files.read_bytes(f"{folder}/parts/settings.json"))  # something was done
        if earlier.get("format") != FORMAT:
            raise UserError(f"{folder}/parts was begun by another version of BabyGPT. Delete it to begin anew.")
        _same_settings(earlier, settings, folder, "holds a half-finished preparation begun")
        source.open(earlier["revision"])
        now = settings | {"revision": source.revision}
        _same_settings(earlier, now, folder, "was begun when the source was another:")
    else:
        if any(name.endswith(".bin") for name in files.names(folder)):
            raise UserError(f"{folder} holds shards but no {MANIFEST}. Move them away or give another --out-dir.")
        source.open()
    if not source.units:
        raise UserError(f"the source {source.name} has no files.")


@contextmanager
def _only_one(here: Path, folder: str) -> Iterator[None]:
    """A lock on the folder; UserError where another process of this machine prepares it."""
    try:
        here.mkdir(parents=True, exist_ok=True)
        lock = os.open(here, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"can't write to {folder}: {error}. Give another --out-dir.") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.access(here, os.W_OK):
            raise UserError(f"can't write to {folder}: it is read-only. Give another --out-dir.")
        yield
    except BlockingIOError:
        raise UserError(f"another fineweb.py prepares {folder} right now. Let it end, or end it.") from None
    finally:
        os.close(lock)
        with suppress(OSError):
            here.rmdir()  # nothing came of it


def _clean(here: Path) -> None:
    """Deletes what a killed run was writing."""
    (here / "parts" / "download").mkdir(parents=True, exist_ok=True)
    ours = re.compile(r".+\.(bin|json|tiktoken)\.[0-9a-f]{32}\.tmp")
    for stale in [*filter(lambda path: ours.fullmatch(path.name), here.iterdir()), *(here / "parts").rglob("*.tmp")]:
        stale.unlink()
    for stale in (here / "parts").rglob("*.incomplete"):  # of a killed download; it can't be gone on with
        stale.unlink()


@contextmanager
def _failures_told() -> Iterator[None]:
    """What can end the work in its middle, in one message."""
    try:
        yield
    except BrokenProcessPool:
        raise UserError(
            "a worker was killed, most likely because the memory ran out. What is done is kept: give the same "
            "command with fewer --workers."
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError("the disk is full. What is done is kept: make room and give the same command.") from None
    except KeyboardInterrupt:
        print("\nstopped: what is done is kept, and the same command goes on from there.", file=sys.stderr)
        raise


def _name(folder: str) -> str:
    return folder.rstrip("/").rsplit("/", 1)[-1] if files.is_remote(folder) else Path(os.path.abspath(folder)).name


def _tokenizer_file(tokenizer: Tokenizer) -> str:
    return tokenizer.file.name if tokenizer.name == "gpt2" else "tokenizer.json"


def _same_settings(earlier: dict, now: dict, folder: str, what: str) -> None:
    differing = [key for key in now if earlier.get(key) != now[key]]
    if differing:
        raise UserError(
            f"{folder} {what} with other settings:\n"
            + "".join(f"  {key}: {earlier.get(key)!r} there, {now[key]!r} now\n" for key in differing)
            + f"Give the same settings to go on, another --out-dir, or delete {folder} to begin anew."
        )


def verify_command(arguments: list[str]) -> None:
    from tqdm import tqdm

    if len(arguments) != 1:
        raise UserError("give one folder: python fineweb.py verify data/NAME")
    folder = arguments[0]
    size = sum(path.stat().st_size for path in open_dataset(folder).folder.glob("*.bin"))
    with tqdm(total=size, unit="B", unit_scale=True, desc="verify") as bar:
        totals = verify(folder, bar.update)
    print(f"{folder} is sound: " + ", ".join(f"{count:,} {what}" for what, count in totals.items()))


def main() -> None:
    import tyro

    if sys.argv[1:2] == ["verify"]:
        return verify_command(sys.argv[2:])
    warm_up()

    def command(
        source: tyro.conf.Positional[str] = "fineweb-edu-10BT",
        /,
        *,
        input: tuple[str, ...] = (),
        out_dir: str | None = None,
        tokenizer: str = "gpt2",
        val_tokens: int | None = None,
        shard_tokens: int = 100_000_000,
        max_tokens: int | None = None,
        min_chars: int | None = None,
        min_score: float | None = None,
        min_language_score: float | None = None,
        quality: Path | None = None,
        min_quality: float | None = None,
        workers: int | None = None,
        engine: Literal["local", "ray"] = "local",
        address: str = "auto",
        text_column: str = "text",
        config: str | None = None,
        split: str = "train",
    ) -> None:
        """Prepares a data set of token shards. `verify FOLDER` checks one.

        Args:
            source: fineweb-edu-10BT, fineweb-edu-100BT, fineweb-10BT, fineweb2-pl (any language), wikipedia-en,
                stdlib (this Python's source code), files (with --input), or OWNER/NAME of a hub data set.
            input: Files, folders or patterns, for the source `files`: parquet, jsonl, txt; .gz .xz .zst too.
            out_dir: Where the data set goes, a folder or a URL such as s3://bucket/name [data/SOURCE].
            tokenizer: "gpt2" or the path of a tokenizer.json.
            val_tokens: Validation tokens, in whole documents [11 M, or 5 % if that is less].
            shard_tokens: Tokens a shard.
            max_tokens: Keep documents in source order up to the one that reaches it.
            min_chars: Leave out documents with fewer characters.
            min_score: Leave out documents whose column `score` is lower (FineWeb-Edu's, 0 to 5).
            min_language_score: The same for the column `language_score` (FineWeb's and FineWeb-2's, 0 to 1).
            quality: A classifier of good documents that quality.py has trained, for --min-quality.
            min_quality: Leave out documents that it gives less, 0 to 1.
            workers: Processes [one a core, as memory allows]. The bytes written don't depend on it.
            engine: Where the work is done: processes of this machine, or a Ray cluster (pip install ray).
            address: Of the Ray cluster; "auto" is the one that this machine belongs to.
            text_column: The column or key that holds a document's text.
            config: Configuration of a hub data set given as OWNER/NAME.
            split: Split of a hub data set given as OWNER/NAME.
        """
        limits = [
            ("val-tokens", val_tokens, 0, 2**31 - 1), ("shard-tokens", shard_tokens, 1, 2**31 - 1),
            ("max-tokens", max_tokens, 1, 10**15), ("min-chars", min_chars, 0, 10**9), ("workers", workers, 1, 10**4),
        ]  # fmt: skip
        for name, value, low, high in limits:
            if value is not None and not low <= value <= high:
                raise UserError(f"--{name} {value} is out of range: {low} to {high:,}.")
        if (quality is None) != (min_quality is None):
            raise UserError("--quality MODEL and --min-quality X go together.")
        filters = Filters(min_chars, min_score, min_language_score, min_quality)
        found = find(source, input, (text_column, *filters.columns), config, split)
        folder = (out_dir or f"data/{source.split('/')[-1]}").removeprefix("file://").rstrip("/") or "/"
        encoder = load_tokenizer(tokenizer)
        model = None if quality is None else QualityModel.load(quality)
        if model is not None:
            check(model, encoder)
        settings = {
            "source": source, "config": config, "split": split, "text_column": text_column,
            "tokenizer_sha256": encoder.sha256, "val_tokens": val_tokens, "shard_tokens": shard_tokens,
            "max_tokens": max_tokens, **asdict(filters),
            "quality_sha256": model and model.sha256,
        }  # fmt: skip
        if engine == "ray" and not files.is_remote(folder):
            folder = os.path.abspath(folder)  # on a disk that all machines share
        ray_address = address if engine == "ray" else None
        with _only_one(files.cache(folder), folder):
            manifest = prepare(found, folder, settings, Setup(encoder, filters, model), workers, ray_address)
        counts = manifest["counts"]
        print(
            f"{folder}: {counts['documents']['kept']:,} documents, {counts['tokens']['train']:,} tokens to train on "
            f"and {counts['tokens']['val']:,} to validate, in {len(manifest['shards'])} shards.\n"
            f"next: python train.py --data.dataset {folder}"
        )
        if counts["documents"]["kept"] == 1:
            print(
                "note: this is a single document (a .txt file is one), and documents are never split, so nothing is "
                "left to validate on: give several files, or train with --general.mode train."
            )

    tyro.cli(command, prog="fineweb.py", description=__doc__)


if __name__ == "__main__":
    run(main)
