"""Sources of documents: named datasets on the Hugging Face Hub, any hub dataset, and local files.

    python fineweb.py fineweb-edu-10BT                       # a named source
    python fineweb.py files --input 'pages/*.jsonl.gz'       # local files, see FORMATS
    python fineweb.py shakespeare                            # tiny Shakespeare
    python fineweb.py roneneldan/TinyStories                 # any hub dataset, with the library `datasets`
    >>> for text in read_documents(find("stdlib")): ...

A source is a list of units (a file, or a batch of small files), and a unit is a list of tasks (a range of row groups
of a parquet file, a range of bytes of a jsonl file, or the batch). Both depend only on the source.
"""

import hashlib
import json
import os
import shlex
import sysconfig
import tempfile
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path

from babygpt import files, hub
from babygpt.data import tasks
from babygpt.data.readers import read, split_file
from babygpt.data.tables import split_parquet
from babygpt.data.tasks import TABLE_FORMATS, UNDECODABLE, Task, TextOptions, check_columns, format_of
from babygpt.data.texts import is_compressed
from babygpt.errors import UserError, suggest

FULL_HASH_BYTES = 16 << 20  # larger files are hashed at their start, middle and end only
HASH_SAMPLE_BYTES = 1 << 16  # at each of the three

# name -> (hub dataset, directory of its parquet files)
HUB_SOURCES = {
    "fineweb-edu-10BT": ("HuggingFaceFW/fineweb-edu", "sample/10BT"),
    "fineweb-edu-100BT": ("HuggingFaceFW/fineweb-edu", "sample/100BT"),
    "fineweb-10BT": ("HuggingFaceFW/fineweb", "sample/10BT"),
    "wikipedia-en": ("wikimedia/wikipedia", "20231101.en"),
}
# language -> configuration of FineWeb-2; `fineweb2-ces_Latn` also works
FINEWEB2_LANGUAGES = {
    "ar": "arb_Arab", "cs": "ces_Latn", "da": "dan_Latn", "de": "deu_Latn", "el": "ell_Grek", "es": "spa_Latn",
    "fa": "fas_Arab", "fr": "fra_Latn", "hu": "hun_Latn", "id": "ind_Latn", "it": "ita_Latn", "ja": "jpn_Jpan",
    "ko": "kor_Hang", "nl": "nld_Latn", "pl": "pol_Latn", "pt": "por_Latn", "ro": "ron_Latn", "ru": "rus_Cyrl",
    "sv": "swe_Latn", "th": "tha_Thai", "tr": "tur_Latn", "uk": "ukr_Cyrl", "vi": "vie_Latn", "zh": "cmn_Hani",
}  # fmt: skip
OFFLINE_HINT = (
    "Without a network, use local files:\n"
    "  python fineweb.py stdlib                                  # source code of Python's standard library\n"
    "  python fineweb.py files --input PATH                      # your files"
)
FORMATS = (
    "parquet, arrow, jsonl, json, csv, tsv, txt, md or py files; all but the first two may be compressed (.gz, .xz, "
    ".zst)"
)
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


@dataclass(frozen=True)
class Unit:
    """The part of a source that one `fetch` downloads."""

    name: str
    bytes: int  # on disk or on the hub, 0 if unknown
    sha256: str | None = None


@dataclass
class Source(ABC):
    """A source of documents. `open` lists its units, `fetch` downloads one and splits it into tasks."""

    name: str
    columns: tuple[str, ...] = ("text",)  # the text column, then numeric columns
    revision: str = ""
    units: list[Unit] = field(default_factory=list)
    num_val_units = 0  # units at the start whose documents are for validation; 0: the plan chooses documents
    max_open_units = 1000  # fetched and not yet released
    is_on_hub = False
    tokens_per_byte = 0.4  # for the estimate of disk; FineWeb-Edu's parquet files have 0.35 GPT-2 tokens per byte

    @abstractmethod
    def open(self, revision: str | None = None) -> None:
        """List the units, of `revision` if the source has several."""

    @abstractmethod
    def fetch(self, unit: int, directory: str) -> list[Task]:
        """Download a unit to `directory` if it is not local, and split it into tasks."""

    def release(self, unit: int, directory: str) -> None:  # noqa: B027, local files have nothing to delete
        """Delete what `fetch` downloaded."""


# ---------------------------------------------------------------------------------------------------------
# local files


@dataclass
class LocalFiles(Source):
    """Files at paths or URLs, including those of the standard library."""

    paths: list[str] = field(default_factory=list)
    val_paths: list[str] = field(default_factory=list)
    options: TextOptions = field(default_factory=TextOptions)
    batches: list[list[str]] = field(default_factory=list)

    def open(self, revision: str | None = None) -> None:
        digest = hashlib.sha256()
        val_batches = _batch_files(self.val_paths, digest)
        if self.val_paths:
            digest.update(b"the files above are for validation\n")
        batches = val_batches + _batch_files(self.paths, digest)
        self.num_val_units = len(val_batches)
        self.batches = [paths for paths, _ in batches]
        self.revision = digest.hexdigest()
        self.units = [Unit(os.path.basename(paths[0]), size) for paths, size in batches]
        has_compressed = any(path.endswith(".parquet") or is_compressed(path) for path in self.paths)
        self.tokens_per_byte = 0.7 if has_compressed else 0.35  # plain English has 0.25

    def fetch(self, unit: int, directory: str) -> list[Task]:
        batch, size = self.batches[unit], self.units[unit].bytes
        if len(batch) == 1:
            return split_file(batch[0], size, self.columns, self.options)
        return [Task("files", tuple(batch), self.columns, options=self.options)]


def is_table(path: str) -> bool:
    return format_of(path) in TABLE_FORMATS.values()


def _batch_files(paths: list[str], digest: "hashlib._Hash") -> list[tuple[list[str], int]]:
    """Return batches of files and their sizes: each table alone, other files in order up to TASK_BYTES."""
    batches: list[tuple[list[str], int]] = []
    for path in paths:
        size = _add_to_digest(path, digest)
        batch, batch_size = batches[-1] if batches else ([], 0)
        if not batch or is_table(path) or is_table(batch[0]) or batch_size + size > tasks.TASK_BYTES:
            batches.append(([path], size))
        else:
            batch.append(path)
            batches[-1] = (batch, batch_size + size)
    return batches


def _add_to_digest(path: str, digest: "hashlib._Hash") -> int:
    """Add name, size and contents of a file, of a large one only samples, to a digest; return its size in bytes."""
    try:
        size = files.size(path)
        digest.update(os.fsencode(f"{os.path.basename(path)} {size}\n"))
        if size <= FULL_HASH_BYTES:
            offsets, length = [0], size
        else:
            offsets, length = [0, size // 2, size - HASH_SAMPLE_BYTES], HASH_SAMPLE_BYTES
        for offset in offsets:
            digest.update(files.read_bytes(path, offset, offset + length))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}). Check its permissions.") from None
    return size


def find_files(patterns: tuple[str, ...], split: str, flag: str = "--input") -> list[str]:
    """Return the files that the patterns match, sorted by path; a directory matches all files below it.

    Files of unknown types are skipped, and their number is printed. `split` selects one of a `save_to_disk` directory.
    """
    paths: set[str] = set()  # absolute, so that no file counts twice
    for pattern in map(os.path.expanduser, patterns):
        if files.is_remote(pattern):
            matched = files.glob(pattern)
        elif os.path.isdir(pattern):
            matched = _walk(pattern, split)
        elif os.path.exists(pattern):
            matched = [pattern]
        else:
            matched = [path for path in glob(pattern, recursive=True) if os.path.isfile(path)]
        if not matched:
            raise UserError(f"{flag} {pattern} matches no file. The current directory is {os.getcwd()}.")
        paths.update(path if files.is_remote(path) else os.path.abspath(path) for path in matched)
    others = sorted(path for path in paths if format_of(path) is None)
    if len(others) == len(paths):
        count = "1 file" if len(others) == 1 else f"{len(others):,} files"
        raise UserError(f"{flag} matches {count} of an unknown type, such as {others[0]}. Use {FORMATS}.")
    if others:
        kinds = Counter(os.path.splitext(path)[1] or "without a suffix" for path in others)
        listed = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common(5))
        print(f"{flag}: {len(others):,} files of an unknown type are skipped ({listed}).")
    return sorted(paths - {*others})


def _walk(root: str, split: str) -> list[str]:
    """Return all files below a directory except for hidden ones. Of a `save_to_disk` directory, return its tables.

    Symbolic links are followed, but no directory is visited twice, so a cycle of links is harmless.
    """
    paths, visited = [], set()
    for directory, subdirectories, names in os.walk(root, followlinks=True):
        real = os.path.realpath(directory)
        if "dataset_dict.json" in names:  # several splits, each saved in a subdirectory
            if split not in subdirectories:
                raise UserError(
                    f"{directory} has no split {split!r}: it has {', '.join(sorted(subdirectories))}. Choose one with "
                    "--split."
                )
            subdirectories[:], names = [split], []
        elif {"dataset_info.json", "state.json"} <= {*names}:
            state = json.loads(Path(directory, "state.json").read_text(encoding="utf-8"))
            names = [file["filename"] for file in state["_data_files"]]  # not the cache of `map`
        subdirectories[:] = [] if real in visited else sorted(n for n in subdirectories if not n.startswith("."))
        if real not in visited:
            paths += [os.path.join(directory, name) for name in names if not name.startswith(".")]
        visited.add(real)
    return [path for path in paths if os.path.isfile(path)]


def _list_standard_library() -> list[str]:
    """Return the .py files of Python's standard library, except for tests and installed packages."""
    root = Path(sysconfig.get_path("stdlib"))
    excluded = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    return sorted(str(p) for p in root.rglob("*.py") if not excluded & set(p.relative_to(root).parts))


# ---------------------------------------------------------------------------------------------------------
# tiny Shakespeare


@dataclass
class Shakespeare(Source):
    """Karpathy's tiny Shakespeare, one text, cut as in nanoGPT: the first 90% of the characters are for training."""

    num_val_units = 1

    def open(self, revision: str | None = None) -> None:
        self.revision = SHAKESPEARE_SHA256
        self.units = [Unit("val.txt", 111_540), Unit("train.txt", 1_003_854)]

    def fetch(self, unit: int, directory: str) -> list[Task]:
        """Download the text, once per machine, and write the part of a unit to `directory`."""
        local = files.local_directory(SHAKESPEARE_URL)
        local.mkdir(parents=True, exist_ok=True)

        def is_valid(path: Path) -> bool:
            return files.sha256(path) == SHAKESPEARE_SHA256

        try:
            files.download(SHAKESPEARE_URL, ["input.txt"], local, is_valid, is_valid, quiet=True)
        except UserError as error:
            raise UserError(
                f"Tiny Shakespeare cannot be downloaded ({error}) Without a network, copy the file to "
                f"{local}/input.txt; its sha256 is {SHAKESPEARE_SHA256}."
            ) from None
        data, path = (local / "input.txt").read_bytes(), f"{directory}/{self.units[unit].name}"
        cut = len(data) * 9 // 10  # every character is one byte
        files.write(path, data[cut:] if unit == 0 else data[:cut])
        return [Task("files", (path,), self.columns)]

    def release(self, unit: int, directory: str) -> None:
        files.remove(f"{directory}/{self.units[unit].name}")


# ---------------------------------------------------------------------------------------------------------
# the Hugging Face Hub


@dataclass
class HubFiles(Source):
    """Parquet files of a hub dataset. Each is downloaded, tokenized and deleted."""

    repo: str = ""
    prefix: str = ""
    max_open_units = 2  # the next file is downloaded while one is tokenized
    is_on_hub = True

    def open(self, revision: str | None = None) -> None:
        api = hub.client().HfApi()
        self.revision = _resolve_revision(self.repo, revision)
        entries = hub.call_with_retries(
            lambda: list(
                api.list_repo_tree(self.repo, self.prefix, recursive=True, revision=self.revision, repo_type="dataset")
            ),
            f"{self.repo}/{self.prefix}",
        )
        parquet_files = sorted((f for f in entries if f.path.endswith(".parquet")), key=lambda f: f.path)
        self.units = [Unit(f.path, f.size, f.lfs.sha256 if f.lfs else None) for f in parquet_files]
        if not self.units:
            raise UserError(f"{self.repo} has no parquet files under {self.prefix}.")

    def fetch(self, unit: int, directory: str) -> list[Task]:
        """Download a unit to `directory`; if that is a URL, download it to this machine and upload it."""
        file = self.units[unit]
        path = f"{directory}/{file.name}"
        if not files.is_remote(directory):
            hub.download(self.repo, file.name, self.revision, Path(directory), "dataset", file.sha256)
        elif not files.exists(path):
            with tempfile.TemporaryDirectory() as temporary:
                local = hub.download(self.repo, file.name, self.revision, Path(temporary), "dataset", file.sha256)
                files.upload(local, path)
        return split_parquet(path, self.columns)

    def release(self, unit: int, directory: str) -> None:
        files.remove(f"{directory}/{self.units[unit].name}")


@dataclass
class HubStream(Source):
    """Any hub dataset, streamed by the library `datasets`. Each shard of the stream is a unit."""

    repo: str = ""
    config: str | None = None
    split: str = "train"
    is_on_hub = True

    def open(self, revision: str | None = None) -> None:
        self.revision = _resolve_revision(self.repo, revision)
        stream = hub.stream(self.repo, self.config, self.split, self.revision)
        if stream.column_names is not None:
            check_columns(self.columns, stream.column_names, self.repo)
        self.units = [Unit(f"{self.repo} shard {i}", 0) for i in range(stream.num_shards)]

    def fetch(self, unit: int, directory: str) -> list[Task]:
        location = (self.repo, self.config or "", self.split, self.revision, str(unit), str(len(self.units)))
        return [Task("stream", location, self.columns)]


def _resolve_revision(repo: str, revision: str | None) -> str:
    try:
        return hub.resolve_revision(repo, revision)
    except hub.UnreachableError as error:
        raise UserError(f"{error}\n{OFFLINE_HINT}") from None


# ---------------------------------------------------------------------------------------------------------
# sources by name


def find(
    name: str, input: tuple[str, ...] = (), columns: tuple[str, ...] = ("text",), config: str | None = None,
    split: str = "train", val_input: tuple[str, ...] = (), options: TextOptions | None = None,
) -> Source:  # fmt: skip
    """Return the source with this name. This lists local files, but does not read or download any."""
    if name == "files":
        if not input:
            raise UserError("The source `files` needs --input, for example --input 'pages/*.jsonl.gz'.")
        val_paths = find_files(val_input, split, "--val-input") if val_input else []
        paths = sorted({*find_files(input, split)} - {*val_paths})
        if not paths:
            raise UserError(
                "--val-input matches all files of --input, so none are left for training. Remove some from --val-input."
            )
        return LocalFiles("files", columns, paths=paths, val_paths=val_paths, options=options or TextOptions())
    options = options or TextOptions()
    given: dict[str, object] = {"--input": input, "--val-input": val_input, "--separator": options.separator}
    given |= {"--encoding": options.encoding, "--skip-bad": options.skip_bad}
    for flag, value in given.items():
        if value:
            raise UserError(f"{flag} is only for the source `files`, not for `{name}`. Remove it.")
    if name == "shakespeare":
        return Shakespeare(name, columns)
    if name == "stdlib":
        return LocalFiles("stdlib", columns, paths=_list_standard_library())
    if name in HUB_SOURCES:
        return HubFiles(name, columns, repo=HUB_SOURCES[name][0], prefix=HUB_SOURCES[name][1])
    if name.startswith("fineweb2-"):
        language = name.removeprefix("fineweb2-")
        language = FINEWEB2_LANGUAGES.get(language, language)
        return HubFiles(name, columns, repo="HuggingFaceFW/fineweb-2", prefix=f"data/{language}/train")
    if name.count("/") == 1:
        return HubStream(name, columns, repo=name, config=config, split=split)
    known = [
        *HUB_SOURCES,
        "fineweb2-pl",
        "fineweb2-LANG",
        "stdlib",
        "shakespeare",
        "files",
        "OWNER/NAME (a dataset on the Hugging Face Hub)",
    ]
    if os.path.exists(name):
        raise UserError(f"{name!r} is a path, not a source. Use `python fineweb.py files --input {shlex.quote(name)}`.")
    raise UserError(f"There is no source {name!r}. {suggest(name, known)}")


def read_documents(source: Source, revision: str | None = None) -> Iterator[str]:
    """Yield all documents of a source in order; download one unit at a time."""
    source.open(revision)
    with tempfile.TemporaryDirectory() as directory:
        for unit in range(len(source.units)):
            for task in source.fetch(unit, directory):
                for batch in read(task):
                    yield from (text.decode() for text in batch.texts if text != UNDECODABLE)
            source.release(unit, directory)


def read_first_documents(source: Source, max_bytes: int) -> Iterator[str]:
    """Yield documents of a source until they have `max_bytes` of UTF-8."""
    total = 0
    for text in read_documents(source):
        yield text
        total += len(text.encode())
        if total >= max_bytes:
            return
