"""Where documents come from: named data sets of the Hugging Face hub, any hub data set, and local files.

    python fineweb.py fineweb-edu-10BT                       # a named source
    python fineweb.py files --input 'pages/*.jsonl.gz'       # parquet, jsonl, txt; .gz .xz .zst too
    python fineweb.py roneneldan/TinyStories                 # any hub data set, through `datasets`
    >>> for text in read_documents(find("stdlib")): ...

A source is a list of units (a file to fetch, or a batch of small ones), and a unit a list of tasks (a range of a
parquet file's row groups or of a jsonl file's bytes, or the batch). Both follow from the source alone, never from
who reads it.
"""

import hashlib
import os
import sysconfig
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path

from babygpt import files, hub
from babygpt.data import readers
from babygpt.data.readers import COMPRESSED, READABLE, Task, check_columns, plain_name, read, split_jsonl, split_parquet
from babygpt.errors import UserError, nearest

WHOLE_BYTES, PLACE_BYTES = 16 << 20, 1 << 16  # files up to the first are hashed whole, of larger ones three places

# name -> (hub data set, folder of its parquet files)
HUB_SOURCES = {
    "fineweb-edu-10BT": ("HuggingFaceFW/fineweb-edu", "sample/10BT"),
    "fineweb-edu-100BT": ("HuggingFaceFW/fineweb-edu", "sample/100BT"),
    "fineweb-10BT": ("HuggingFaceFW/fineweb", "sample/10BT"),
    "wikipedia-en": ("wikimedia/wikipedia", "20231101.en"),
}
# short names for FineWeb-2's configurations; `fineweb2-ces_Latn` and the like work as they are
FINEWEB2_LANGUAGES = {
    "ar": "arb_Arab", "cs": "ces_Latn", "da": "dan_Latn", "de": "deu_Latn", "el": "ell_Grek", "es": "spa_Latn",
    "fa": "fas_Arab", "fr": "fra_Latn", "hu": "hun_Latn", "id": "ind_Latn", "it": "ita_Latn", "ja": "jpn_Jpan",
    "ko": "kor_Hang", "nl": "nld_Latn", "pl": "pol_Latn", "pt": "por_Latn", "ro": "ron_Latn", "ru": "rus_Cyrl",
    "sv": "swe_Latn", "th": "tha_Thai", "tr": "tur_Latn", "uk": "ukr_Cyrl", "vi": "vie_Latn", "zh": "cmn_Hani",
}  # fmt: skip
OFFLINE_WAYS = (
    "With no network, prepare what is at hand:\n"
    "  python fineweb.py stdlib                                  # this Python's own source code\n"
    "  python fineweb.py files --input 'PATH/*.parquet'          # parquet, jsonl or txt files of yours"
)


@dataclass(frozen=True)
class Unit:
    """What is fetched at once. `bytes` is its size on disk or in the hub, 0 where that is unknown."""

    name: str
    bytes: int
    sha256: str | None = None


@dataclass
class Source(ABC):
    """A source of documents; `open` finds its units, `fetch` brings one here and splits it into tasks."""

    name: str
    columns: tuple[str, ...] = ("text",)  # the text's, then those of numbers
    revision: str = ""
    units: list[Unit] = field(default_factory=list)
    max_open_units = 1000  # how many may be fetched and not yet released
    downloads = False
    tokens_per_byte = 0.4  # for the estimate of disk; FineWeb-Edu's parquet files hold 0.35 GPT-2 tokens a byte

    @abstractmethod
    def open(self, revision: str | None = None) -> None:
        """Finds the units, of `revision` where the source has several."""

    @abstractmethod
    def fetch(self, unit: int, folder: str) -> list[Task]:
        """Brings a unit to `folder`, if it isn't here, and splits it into tasks."""

    def release(self, unit: int, folder: str) -> None:  # noqa: B027, local files have nothing to delete
        """Deletes what `fetch` downloaded."""


# ---------------------------------------------------------------------------------------------------------
# local files


@dataclass
class LocalFiles(Source):
    """Files of this machine, by path; also the standard library's."""

    paths: list[str] = field(default_factory=list)
    batches: list[list[str]] = field(default_factory=list)

    def open(self, revision: str | None = None) -> None:
        """Each parquet file is a unit; smaller files share one, TASK_BYTES together, in their order."""
        digest, self.batches = hashlib.sha256(), []
        sizes: list[int] = []
        for path in self.paths:
            try:
                size = files.size(path)
                digest.update(os.fsencode(f"{os.path.basename(path)} {size}\n"))
                whole = size <= WHOLE_BYTES
                for place in (0,) if whole else (0, size // 2, max(0, size - PLACE_BYTES)):
                    digest.update(files.read_bytes(path, place, place + (size if whole else PLACE_BYTES)))
            except OSError as error:
                raise UserError(f"{path} can't be read: {error.strerror}.") from None
            alone = path.endswith(".parquet") or not self.batches or self.batches[-1][0].endswith(".parquet")
            if alone or sizes[-1] + size > readers.TASK_BYTES:
                self.batches.append([path])
                sizes.append(size)
            else:
                self.batches[-1].append(path)
                sizes[-1] += size
        self.revision = digest.hexdigest()
        self.units = [Unit(os.path.basename(batch[0]), size) for batch, size in zip(self.batches, sizes, strict=True)]
        packed = any(path.endswith((".parquet", *COMPRESSED)) for path in self.paths)
        self.tokens_per_byte = 0.7 if packed else 0.35  # plain English has 0.25

    def fetch(self, unit: int, folder: str) -> list[Task]:
        batch, size = self.batches[unit], self.units[unit].bytes
        if batch[0].endswith(".parquet"):
            return split_parquet(batch[0], self.columns)
        if batch[0].endswith(".jsonl") and size > readers.TASK_BYTES:
            return split_jsonl(batch[0], size, self.columns)
        return [Task("files", tuple(batch), self.columns)]


def _match(patterns: tuple[str, ...]) -> list[str]:
    """Files that the patterns name, sorted by path; a folder stands for all files below it."""
    if not patterns:
        raise UserError("the source `files` needs --input, for instance --input 'pages/*.jsonl.gz'.")
    paths: set[str] = set()
    for pattern in map(os.path.expanduser, patterns):
        if files.is_remote(pattern):
            matched = files.glob(pattern)
        elif os.path.isdir(pattern):
            matched = _files_below(pattern)
        elif os.path.exists(pattern):
            matched = [pattern]
        else:
            matched = [path for path in glob(pattern, recursive=True) if os.path.isfile(path)]
        if not matched:
            raise UserError(f"--input {pattern} names no file (looked from {os.getcwd()}).")
        paths.update(matched)
    unknown = sorted(p for p in paths if not p.endswith(".parquet") and not plain_name(p).endswith(READABLE))
    if unknown:
        raise UserError(
            f"--input names {len(unknown)} files of an unknown kind, {unknown[0]} for one. Known are parquet, jsonl "
            "and txt, the latter two also as .gz, .xz and .zst."
        )
    return sorted(path if files.is_remote(path) else os.path.abspath(path) for path in paths)


def _files_below(folder: str) -> list[str]:
    """All files of a folder, links followed, hidden ones left out; no folder twice, so a circle of links ends."""
    found, seen = [], set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith("."))
        if real not in seen:
            found += [os.path.join(parent, name) for name in names if not name.startswith(".")]
        seen.add(real)
    return [path for path in found if os.path.isfile(path)]


def _standard_library() -> list[str]:
    """The .py files of the running Python's standard library, but for tests and installed packages."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    return sorted(str(p) for p in root.rglob("*.py") if not left_out & set(p.relative_to(root).parts))


# ---------------------------------------------------------------------------------------------------------
# the Hugging Face hub


@dataclass
class HubFiles(Source):
    """Parquet files of a hub data set, each downloaded, tokenized and deleted in turn."""

    repo: str = ""
    prefix: str = ""
    max_open_units = 2  # the next file is downloaded while one is tokenized
    downloads = True

    def open(self, revision: str | None = None) -> None:
        api = hub.client().HfApi()
        self.revision = _revision(self.repo, revision)
        tree = hub.call(
            lambda: list(
                api.list_repo_tree(self.repo, self.prefix, recursive=True, revision=self.revision, repo_type="dataset")
            ),
            f"{self.repo}/{self.prefix}",
        )
        parquet_files = sorted((f for f in tree if f.path.endswith(".parquet")), key=lambda f: f.path)
        self.units = [Unit(f.path, f.size, f.lfs.sha256 if f.lfs else None) for f in parquet_files]
        if not self.units:
            raise UserError(f"{self.repo} has no parquet files under {self.prefix}.")

    def fetch(self, unit: int, folder: str) -> list[Task]:
        """Into `folder`, or where that is a URL, by way of this machine to there."""
        file = self.units[unit]
        path = f"{folder}/{file.name}"
        if not files.is_remote(folder):
            hub.download(self.repo, file.name, self.revision, Path(folder), "dataset", file.sha256)
        elif not files.exists(path):
            with tempfile.TemporaryDirectory() as here:
                name = hub.download(self.repo, file.name, self.revision, Path(here), "dataset", file.sha256)
                files.upload(name, path)
        return split_parquet(path, self.columns)

    def release(self, unit: int, folder: str) -> None:
        files.remove(f"{folder}/{self.units[unit].name}")


@dataclass
class HubStream(Source):
    """Any hub data set, streamed by the library `datasets`; each of its files is a unit."""

    repo: str = ""
    config: str | None = None
    split: str = "train"
    downloads = True

    def open(self, revision: str | None = None) -> None:
        self.revision = _revision(self.repo, revision)
        stream = hub.stream(self.repo, self.config, self.split, self.revision)
        if stream.column_names is not None:
            check_columns(self.columns, stream.column_names, self.repo)
        self.units = [Unit(f"{self.repo} shard {i}", 0) for i in range(stream.num_shards)]

    def fetch(self, unit: int, folder: str) -> list[Task]:
        where = (self.repo, self.config or "", self.split, self.revision, str(unit), str(len(self.units)))
        return [Task("stream", where, self.columns)]


def _revision(repo: str, revision: str | None) -> str:
    try:
        return hub.revision_of(repo, revision)
    except hub.Unreachable as error:
        raise UserError(f"{error}\n{OFFLINE_WAYS}") from None


# ---------------------------------------------------------------------------------------------------------
# finding one


def find(
    name: str, input: tuple[str, ...] = (), columns: tuple[str, ...] = ("text",), config: str | None = None,
    split: str = "train",
) -> Source:  # fmt: skip
    """The source of that name; nothing is read yet but the names of local files."""
    if name == "files":
        return LocalFiles("files", columns, paths=_match(input))
    if input:
        raise UserError(f"--input goes with the source `files`, not with `{name}`.")
    if name == "stdlib":
        return LocalFiles("stdlib", columns, paths=_standard_library())
    if name in HUB_SOURCES:
        return HubFiles(name, columns, repo=HUB_SOURCES[name][0], prefix=HUB_SOURCES[name][1])
    if name.startswith("fineweb2-"):
        language = name.removeprefix("fineweb2-")
        language = FINEWEB2_LANGUAGES.get(language, language)
        return HubFiles(name, columns, repo="HuggingFaceFW/fineweb-2", prefix=f"data/{language}/train")
    if name.count("/") == 1:
        return HubStream(name, columns, repo=name, config=config, split=split)
    known = [*HUB_SOURCES, "fineweb2-pl", "fineweb2-LANG", "stdlib", "files", "OWNER/NAME (a data set of the hub)"]
    raise UserError(f"There is no source {name!r}. {nearest(name, known)}")


def read_documents(source: Source, revision: str | None = None) -> Iterator[str]:
    """All documents of a source in order, downloading a file at a time."""
    source.open(revision)
    with tempfile.TemporaryDirectory() as folder:
        for unit in range(len(source.units)):
            for task in source.fetch(unit, folder):
                for batch in read(task):
                    yield from map(bytes.decode, batch.texts)
            source.release(unit, folder)


def read_first_documents(source: Source, max_bytes: int) -> Iterator[str]:
    """Documents of a source until `max_bytes` of UTF-8 are reached."""
    total = 0
    for text in read_documents(source):
        yield text
        total += len(text.encode())
        if total >= max_bytes:
            return
