"""The working directory of a preparation: lock, settings, leftovers of a killed run, completion."""

import errno
import fcntl
import json
import os
import re
import sys
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from pathlib import Path

from babygpt import files
from babygpt.data.shards import MANIFEST, read_manifest
from babygpt.data.sources import Source
from babygpt.data.tokenizer import Tokenizer
from babygpt.errors import UserError

FORMAT = 2  # of parts/: another one where tasks, hashes or indexes change


def remove_parts(parts: str, scratch: Path) -> None:
    for left in {parts, str(scratch)}:
        files.remove(left)


def finished(source: Source, folder: str, settings: dict) -> dict | None:
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


def open_source(source: Source, folder: str, settings: dict) -> None:
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
def lock_folder(here: Path, folder: str) -> Iterator[None]:
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


def remove_leftovers(here: Path) -> None:
    """Deletes what a killed run was writing."""
    (here / "parts" / "download").mkdir(parents=True, exist_ok=True)
    ours = re.compile(r".+\.(bin|json|tiktoken)\.[0-9a-f]{32}\.tmp")
    for stale in [*filter(lambda path: ours.fullmatch(path.name), here.iterdir()), *(here / "parts").rglob("*.tmp")]:
        stale.unlink()
    for stale in (here / "parts").rglob("*.incomplete"):  # of a killed download; it can't be gone on with
        stale.unlink()


@contextmanager
def report_failures() -> Iterator[None]:
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


def dataset_name(folder: str) -> str:
    return folder.rstrip("/").rsplit("/", 1)[-1] if files.is_remote(folder) else Path(os.path.abspath(folder)).name


def tokenizer_file(tokenizer: Tokenizer) -> str:
    return tokenizer.file.name if tokenizer.name == "gpt2" else "tokenizer.json"


def _same_settings(earlier: dict, now: dict, folder: str, what: str) -> None:
    differing = [key for key in now if earlier.get(key) != now[key]]
    if differing:
        raise UserError(
            f"{folder} {what} with other settings:\n"
            + "".join(f"  {key}: {earlier.get(key)!r} there, {now[key]!r} now\n" for key in differing)
            + f"Give the same settings to go on, another --out-dir, or delete {folder} to begin anew."
        )
