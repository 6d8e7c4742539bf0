"""Conversations and preferences for finetuning: read, split by their prompts, and stored once.

Records are the lines of a jsonl file, the items of a json file, or the rows of a dataset on the Hugging Face Hub:

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    {"instruction": "...", "input": "...", "output": "..."}                  # input may be missing or empty
    {"prompt": "...", "chosen": "...", "rejected": "..."}                    # a preference
    {"prompt": [...], "chosen": [...], "rejected": [...]}                    # the same with messages

>>> directory = prepare(DataSource("data/instructions.jsonl"), "conversations", held_out=0.1, root=Path("data/chat"))
>>> conversations = list(read_split(directory, "val"))

The split of a record depends on its prompt alone, so equal prompts are in the same split, even across datasets with the
same `held_out`.
"""

import fcntl
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from glob import glob
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from babygpt import files, hub
from babygpt.chat.template import Conversation, Message, check_conversation
from babygpt.console import console
from babygpt.data.tasks import format_of
from babygpt.data.texts import read_objects
from babygpt.errors import ConfigError, UserError

Kind = Literal["conversations", "preferences"]
Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
FORMAT = 1  # of a prepared directory
MANIFEST = "dataset.json"


@dataclass(frozen=True)
class DataSource:
    """Where records come from."""

    location: str  # a file, a glob pattern, or the name of a dataset on the Hugging Face Hub
    config: str | None = None  # configuration of the dataset on the hub
    split: str = "train"  # its split


# ---------------------------------------------------------------------------------------------------------
# records


def to_conversation(record: Any) -> dict[str, Any]:
    """Return {"messages": ...}, for a preference those of the chosen answer. ValueError with a reason if invalid."""
    if not isinstance(record, dict):
        raise ValueError("it is not an object")
    if "messages" in record:
        messages = check_conversation(record["messages"])
    elif "instruction" in record and "output" in record:
        messages = [user_message(record), *check_conversation([{"role": "assistant", "content": record["output"]}])]
    elif "chosen" in record:
        pair = to_preference(record)
        messages = [*pair["prompt"], {"role": "assistant", "content": pair["chosen"]}]
    else:
        raise ValueError(f"it needs messages, or instruction and output, but has {', '.join(map(str, record)):.100}")
    if all(message["role"] != "assistant" for message in messages):
        raise ValueError("it has no assistant message")
    return {"messages": messages}


def to_preference(record: Any) -> dict[str, Any]:
    """Return {"prompt": messages, "chosen": text, "rejected": text}. ValueError with a reason if invalid."""
    if not isinstance(record, dict) or not {"chosen", "rejected"} <= record.keys():
        raise ValueError("it needs chosen and rejected")
    prompts, answers = [], []
    for answer in (record["chosen"], record["rejected"]):
        if isinstance(answer, str):
            prompts.append(prompt_of(record))
            answers.append(answer)
            continue
        messages = check_conversation(answer)
        if messages[-1]["role"] != "assistant":
            raise ValueError("chosen and rejected must end with a message of the assistant")
        # chosen and rejected may contain the prompt or follow it
        prompts.append(messages[:-1] or prompt_of(record))
        answers.append(messages[-1]["content"])
    if prompts[0] != prompts[1]:
        raise ValueError("chosen and rejected must have the same prompt")
    return {"prompt": prompts[0], "chosen": answers[0], "rejected": answers[1]}


def prompt_of(record: dict[str, Any]) -> Conversation:
    if "instruction" in record:
        return [user_message(record)]
    prompt = record.get("prompt")
    return check_conversation([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt)


def user_message(record: dict[str, Any]) -> Message:
    """Return the instruction and, if it is not empty, the input, separated by an empty line."""
    parts = [record["instruction"], record.get("input") or ""]
    if not all(isinstance(part, str) for part in parts):
        raise ValueError("instruction and input must be strings")
    return {"role": "user", "content": "\n\n".join(part.strip() for part in parts if part.strip())}


def split_of(record: dict[str, Any], held_out: float) -> Split:
    """Return the split of a record: a fraction `held_out` of all prompts is in val, and the same fraction in test.

    The split depends on `first_prompt`, ignoring case and whitespace.
    """
    text = "\n".join(" ".join(message["content"].split()).casefold() for message in first_prompt(record))
    digest = hashlib.blake2b(text.encode(errors="replace"), digest_size=8).digest()
    position = int.from_bytes(digest, "little") / 2**64
    return "test" if position < held_out else "val" if position < 2 * held_out else "train"


def first_prompt(record: dict[str, Any]) -> Conversation:
    """Return the messages of a conversation, or of the prompt of a preference, before the first answer."""
    messages = record["prompt"] if "prompt" in record else record["messages"]
    return list(takewhile(lambda message: message["role"] != "assistant", messages))


# ---------------------------------------------------------------------------------------------------------
# prepared directories


def prepare(source: DataSource, kind: Kind, held_out: float, root: Path) -> Path:
    """Return the directory with the splits of a source, which is written on the first call.

    A directory that was prepared earlier can be given as the source. UserError if a record of a file, or the first
    record of a dataset on the hub, is invalid. Other invalid records on the hub, which a user cannot edit, are skipped
    with a warning.
    """
    given = Path(source.location)
    if (given / MANIFEST).is_file():
        check_prepared(given, kind)
        return given
    paths = find_files(source.location)
    revision = _hash_files(paths) if paths else _hub_revision(source)
    settings: dict[str, Any] = {"format": FORMAT, "kind": kind, "held_out": held_out, "revision": revision}
    if not paths:
        settings |= {"config": source.config, "split": source.split}
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    name = re.sub(r"\W+", "-", given.name.split(".")[0])[:60].strip("-") or "data"
    directory = root / f"{name}-{kind}-{key}"
    if not (directory / MANIFEST).exists():
        directory.mkdir(parents=True, exist_ok=True)
        with open(directory / ".lock", "w") as lock:
            with suppress(OSError):  # some file systems have no locks
                fcntl.flock(lock, fcntl.LOCK_EX)  # wait for another process that prepares the same data
            if not (directory / MANIFEST).exists():
                records = _read_files(paths) if paths else _read_hub(source, revision)
                written = _write_splits(directory, source, records, kind, held_out, skip_invalid=not paths)
                files.write_json(directory / MANIFEST, settings | {"source": source.location} | written)
    check_prepared(directory, kind)
    return directory


def _write_splits(
    directory: Path, source: DataSource, records: Iterator[tuple[str, Any]], kind: Kind, held_out: float,
    skip_invalid: bool,
) -> dict[str, Any]:  # fmt: skip
    """Write `records`, each with its location, to the files of their splits, and return a part of the manifest."""
    for stale in directory.glob("*.tmp"):  # left by a killed process
        stale.unlink()
    counts, sizes, first_invalid = Counter[str](), Counter[Split](), ""
    convert = to_conversation if kind == "conversations" else to_preference
    with ExitStack() as stack:
        outputs = {split: stack.enter_context(files.create(directory / f"{split}.jsonl")) for split in SPLITS}
        for location, record in tqdm(records, desc="prepare", unit=" records", leave=False, disable=None):
            counts["records"] += 1
            try:
                converted = convert(record)
            except ValueError as error:
                if not skip_invalid or counts["records"] == 1:
                    advice = "Use another dataset" if skip_invalid else "Fix or remove it"
                    raise UserError(f"{location} cannot be used for {kind}: {error}. {advice}.") from None
                first_invalid = first_invalid or f"{location}: {error}"
                counts["invalid"] += 1
                continue
            if kind == "preferences" and converted["chosen"].strip() == converted["rejected"].strip():
                counts["equal_answers"] += 1  # there is nothing to prefer
                continue
            split = split_of(converted, held_out)
            outputs[split].write((json.dumps(converted, ensure_ascii=False) + "\n").encode(errors="replace"))
            sizes[split] += 1
        if not sizes["train"]:
            raise UserError(f"{source.location} has no records for training. Use more data, or a smaller --held-out.")
    if first_invalid:
        console.warning(
            f"{counts['invalid']:,} of {counts['records']:,} records are invalid and were skipped. The first one is "
            f"{first_invalid}."
        )
    hashes = {split: files.sha256(directory / f"{split}.jsonl") for split in SPLITS}
    return {**counts, "splits": {split: {"records": sizes[split], "sha256": hashes[split]} for split in SPLITS}}


def find_kind(source: DataSource) -> Kind:
    """Return the kind of a prepared directory, or of the first record: if it has chosen and rejected, a preference."""
    directory = Path(source.location)
    if (directory / MANIFEST).is_file():
        return read_manifest(directory)["kind"]
    paths = find_files(source.location)
    records = _read_files(paths) if paths else _read_hub(source, _hub_revision(source))
    for _, record in records:
        return (
            "preferences" if isinstance(record, dict) and {"chosen", "rejected"} <= record.keys() else "conversations"
        )
    return "conversations"


def find_files(location: str) -> list[str]:
    """Return the path of a file, or the paths that match a pattern."""
    return [location] if os.path.isfile(location) else sorted(glob(location))


def _hash_files(paths: list[str]) -> str:
    for path in paths:
        if format_of(path) not in ("jsonl", "json"):
            raise ConfigError(f"{path} is neither a jsonl nor a json file. Convert it, or use other data.")
    return hashlib.sha256("".join(map(files.sha256, paths)).encode()).hexdigest()


def _hub_revision(source: DataSource) -> str:
    is_name = source.location.count("/") == 1 and not source.location.startswith((".", "/"))
    if not is_name or format_of(source.location) or os.path.isdir(os.path.dirname(source.location)):
        raise ConfigError(
            f"There is no file at {source.location}. Use a jsonl or json file, or the name of a dataset on the Hugging "
            "Face Hub, such as HuggingFaceTB/smoltalk."
        )
    return hub.resolve_revision(source.location)


def _read_files(paths: list[str]) -> Iterator[tuple[str, Any]]:
    for path in paths:
        yield from read_objects(path)


def _read_hub(source: DataSource, revision: str) -> Iterator[tuple[str, Any]]:
    rows = hub.stream(source.location, source.config, source.split, revision)
    for number, row in enumerate(rows):
        yield f"{source.location}, row {number:,}", row


def read_manifest(directory: Path) -> dict[str, Any]:
    try:
        return json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{directory / MANIFEST} cannot be read ({error}). Delete the directory.") from None


def check_prepared(directory: Path, kind: Kind) -> None:
    """Raise a UserError unless a directory contains intact data of this kind."""
    manifest = read_manifest(directory)
    if manifest.get("format") != FORMAT or "kind" not in manifest:
        raise ConfigError(f"{directory} does not contain data that finetune.py prepared. Use other data.")
    if manifest["kind"] != kind:
        raise ConfigError(f"{directory} contains {manifest['kind']}, but {kind} are needed. Use other data.")
    for split, described in manifest["splits"].items():
        path = directory / f"{split}.jsonl"
        if not path.exists() or files.sha256(path) != described["sha256"]:
            raise UserError(f"{path} is missing or corrupted. Delete {directory} to prepare it again.")


def read_split(directory: Path, split: Split) -> Iterator[dict[str, Any]]:
    """Yield the records of a split of a prepared directory."""
    with open(directory / f"{split}.jsonl", encoding="utf-8") as file:
        yield from map(json.loads, file)
