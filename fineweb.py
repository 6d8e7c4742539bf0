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

import json
import os
import sys
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from babygpt import files
from babygpt.data.filters import Filters
from babygpt.data.plan import plan
from babygpt.data.quality import QualityModel, check
from babygpt.data.resources import check_room
from babygpt.data.shards import MANIFEST, open_dataset, verify
from babygpt.data.sources import Source, find
from babygpt.data.stages import MapStage, write_shards
from babygpt.data.tokenizer import load_tokenizer
from babygpt.data.workers import Pool, Setup, local_workers, ray_workers, warm_up
from babygpt.data.workspace import (
    FORMAT,
    dataset_name,
    finished,
    lock_folder,
    open_source,
    remove_leftovers,
    remove_parts,
    report_failures,
    tokenizer_file,
)  # fmt: skip
from babygpt.errors import UserError, run
from babygpt.files import write_json


def prepare(
    source: Source, folder: str, settings: dict, setup: Setup, workers: int | None, ray_address: str | None
) -> dict:
    """Runs map, plan and write, going on where an earlier run of the same settings stopped; returns the manifest."""
    tokenizer, parts = setup.tokenizer, f"{folder}/parts"
    here = files.cache(folder)
    scratch = here / "parts"  # what only this machine needs
    if (manifest := finished(source, folder, settings)) is not None:
        remove_parts(parts, scratch)  # of a run killed in its last breath
        print(f"{folder} is complete already.")
        return manifest
    open_source(source, folder, settings)
    count = check_room(source, settings, folder, workers, tokenizer.vocab_size) if ray_address is None else 0
    begun = {"format": FORMAT} | settings | {"revision": source.revision}
    remove_leftovers(here)
    if not files.is_remote(folder):
        os.makedirs(parts, exist_ok=True)
    write_json(f"{parts}/settings.json", begun)

    # other machines need what is downloaded too
    downloads = f"{parts if ray_address else scratch}/download"
    engine: AbstractContextManager[tuple[Pool, int]]
    engine = local_workers(count, setup) if ray_address is None else ray_workers(ray_address, setup)
    with report_failures(), engine as (pool, count):
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

    beside = f"{folder}/{tokenizer_file(tokenizer)}"
    if not (files.exists(beside) and files.read_bytes(beside) == tokenizer.data):
        files.write(beside, tokenizer.data)
    if json.loads(files.read_bytes(f"{parts}/settings.json")) != begun:
        raise UserError(f"another fineweb.py with other settings writes to {folder}. Give each its own --out-dir.")
    counts = {"documents": placed.documents, "tokens": placed.tokens, "text_bytes": placed.bytes}
    manifest = {
        "format": 1,
        "name": dataset_name(folder),
        "settings": settings | {"revision": source.revision},
        "tokenizer": {"name": tokenizer.name, "file": tokenizer_file(tokenizer), "sha256": tokenizer.sha256},
        "eot_id": tokenizer.eot_id,
        "vocab_size": tokenizer.vocab_size,
        "split_rule": "by document: the smallest xxh3-128 hashes of the text validate",
        "counts": counts | {"filtered_by": placed.filtered_by},
        "shards": shards,
    }
    write_json(f"{folder}/{MANIFEST}", manifest)
    remove_parts(parts, scratch)
    return manifest


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
            quality: A quality filter that tools.train_quality_filter has trained, for --min-quality.
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
        with lock_folder(files.cache(folder), folder):
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
