"""The directory of a dataset during its preparation: lock, settings, finished tasks, commit.

dataset.json is written last, so a dataset with a dataset.json is complete. Until then, `parts/` contains the finished
tasks and the settings. A run with the same settings resumes, a run with different settings is rejected.
"""

import errno
import fcntl
import glob
import json
import math
import os
import re
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from typing import Any

from babygpt import files
from babygpt.data.plan import Plan
from babygpt.data.shards import MANIFEST, read_manifest
from babygpt.data.sources import Source
from babygpt.data.tokenizer import Tokenizer
from babygpt.errors import UserError
from babygpt.files import write_json

KEPT_AFTER = 60.0  # seconds after which a failed preparation keeps its finished tasks
FORMAT = 3  # of parts/; increase it when tasks, hashes or indexes change


class Workspace:
    """The directory or URL of a dataset. `with` locks it and compares the settings with those of an earlier run."""

    def __init__(self, directory: str, settings: dict[str, Any], source: Source):
        self.directory, self.settings, self.source = directory, settings, source
        self.name = os.path.basename(directory if files.is_remote(directory) else os.path.abspath(directory))
        self.parts = f"{directory}/parts"  # shared by all workers
        self.local = files.local_directory(directory)  # `directory`, or for a URL a directory on this machine
        self.scratch = self.local / "parts"  # temporary files of this machine
        self.is_new = False  # whether this process has created the directory
        self.begun = -math.inf  # time of `begin`
        self.manifest: dict[str, Any] = {}  # contents of dataset.json, empty until the dataset is complete

    def __enter__(self) -> "Workspace":
        self._lock()
        try:
            self.manifest = read_manifest(self.directory) or {}
            if self.manifest:
                self._check_complete()
            else:
                self._check_unfinished()
        except BaseException as error:
            self.__exit__(type(error), error)
            raise
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, *_: Any) -> None:
        """Unlock the directory. Raise a UserError if the disk is full or a worker was killed."""
        is_recent = time.monotonic() - self.begun < KEPT_AFTER
        if isinstance(error, UserError) and self.is_new and is_recent and not self.source.is_on_hub:
            self._remove_files()  # a retry with different files or settings could not resume
        os.close(self._lock_fd)
        with suppress(OSError):
            self.local.rmdir()  # succeeds if it is empty
        resume_hint = "Finished tasks are kept. To resume, run the same command"
        if isinstance(error, KeyboardInterrupt):
            print(f"\nStopped. {resume_hint} again.", file=sys.stderr)
        elif isinstance(error, BrokenProcessPool):
            raise UserError(
                f"A worker was killed, probably because the machine ran out of memory. {resume_hint} with fewer "
                "--workers."
            ) from None
        elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"The disk is full. {resume_hint} after freeing space.") from None

    def begin(self) -> None:
        """Delete the incomplete files of a killed run and write settings.json."""
        self.begun = time.monotonic()
        (self.scratch / "download").mkdir(parents=True, exist_ok=True)
        stale = [path for path in self.local.iterdir() if files.TEMPORARY_SUFFIX.search(path.name)]
        for path in [*stale, *self.scratch.rglob("*.tmp"), *self.scratch.rglob("*.incomplete")]:
            path.unlink()
        self.written_settings = {"format": FORMAT} | self.settings
        write_json(f"{self.parts}/settings.json", self.written_settings)

    def commit(self, plan: Plan, shards: list[dict[str, Any]], tokenizer: Tokenizer) -> None:
        """Write the tokenizer, then dataset.json, and delete the parts."""
        tokenizer_file = tokenizer.file.name if tokenizer.name == "gpt2" else "tokenizer.json"
        path = f"{self.directory}/{tokenizer_file}"
        if not (files.exists(path) and files.read_bytes(path) == tokenizer.data):
            files.write(path, tokenizer.data)
        if json.loads(files.read_bytes(f"{self.parts}/settings.json")) != self.written_settings:
            raise UserError(
                f"Another fineweb.py process with different settings is writing to {self.directory}. Stop both, "
                "delete the directory, and use a different --out-dir for one of them."
            )
        counts = {"documents": plan.documents, "tokens": plan.tokens, "text_bytes": plan.text_bytes}
        self.manifest = {
            "format": 1,
            "name": self.name,
            "settings": self.settings,
            "tokenizer": {"name": tokenizer.name, "file": tokenizer_file, "sha256": tokenizer.sha256},
            "eot_id": tokenizer.eot_id,
            "vocab_size": tokenizer.vocab_size,
            "split_rule": plan.split_rule,
            "counts": counts | {"filtered_by": plan.filtered_by},
            "shards": shards,
        }
        write_json(f"{self.directory}/{MANIFEST}", self.manifest)
        files.remove(self.parts)
        files.remove(self.scratch)  # equal to `parts`, unless `directory` is a URL

    def _remove_files(self) -> None:
        """Delete the parts and shards."""
        files.remove(self.parts)
        files.remove(self.scratch)
        for path in self.local.glob(f"{glob.escape(self.name)}_*.bin"):
            path.unlink()

    def _lock(self) -> None:
        self.is_new = not files.is_remote(self.directory) and not self.local.exists()
        try:
            self.local.mkdir(parents=True, exist_ok=True)
            if not os.access(self.local, os.W_OK):
                raise PermissionError("it is read-only")
            self._lock_fd = os.open(self.local, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"{self.directory} cannot be written to: {error}. Use a different --out-dir.") from None
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock_fd)
            raise UserError(
                f"Another fineweb.py process is preparing {self.directory}. Wait for it, or stop it."
            ) from None

    def _check_complete(self) -> None:
        """Raise a UserError if the complete dataset has different settings or lacks shards."""
        if not self.source.is_on_hub:  # the revision on the hub is not compared, since that requires a network
            self._open_source()
        self._check_settings(self.manifest["settings"], "a complete dataset with different settings")
        existing = files.list_names(self.directory)
        if missing := [shard["file"] for shard in self.manifest["shards"] if shard["file"] not in existing]:
            raise UserError(
                f"{self.directory} is missing {', '.join(missing)}, which {MANIFEST} lists. Copy the shards there, or "
                f"delete {MANIFEST} and all shards to prepare them again."
            )
        files.remove(self.parts)  # left by a run that was killed after its commit
        files.remove(self.scratch)

    def _check_unfinished(self) -> None:
        """Open the source, in the revision of an earlier run, if any. UserError if that run had different settings."""
        names = files.list_names(self.parts)
        if "settings.json" in names and any(re.fullmatch(r"\d{5}(-\d{5}\.npz|\.json)", name) for name in names):
            earlier = json.loads(files.read_bytes(f"{self.parts}/settings.json"))  # of a run that finished a task
            if earlier.get("format") != FORMAT:
                raise UserError(f"{self.parts} was written by a different version of BabyGPT. Delete it to start over.")
            self._check_settings(earlier, "an unfinished dataset with different settings")
            self._open_source(earlier["revision"])
            self._check_settings(earlier, "an unfinished dataset of a different revision of the source")
        else:
            if any(name.endswith(".bin") for name in files.list_names(self.directory)):
                raise UserError(
                    f"{self.directory} has shards but no {MANIFEST}. Move them or use a different --out-dir."
                )
            self._open_source()

    def _open_source(self, revision: str | None = None) -> None:
        self.source.open(revision)
        self.settings = self.settings | {"revision": self.source.revision}

    def _check_settings(self, earlier: dict[str, Any], description: str) -> None:
        """Raise a UserError that lists the settings that differ from those of the earlier run."""
        differing = [key for key, value in self.settings.items() if earlier.get(key) != value]
        if differing:
            raise UserError(
                f"{self.directory} contains {description}:\n"
                + "".join(f"  {key}: {earlier.get(key)!r} before, {self.settings[key]!r} now\n" for key in differing)
                + f"Use the same settings or a different --out-dir, or delete {self.directory} to start over."
            )
