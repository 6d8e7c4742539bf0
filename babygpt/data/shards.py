"""Datasets on disk: token shards with a manifest, read as one long array.

A dataset is a directory: `<name>_val_000000.bin`, `<name>_train_000001.bin`, ... and `dataset.json`. A shard is a
header of 256 little-endian int32 (magic, version, token count, zeros), then the tokens: byte-compatible with the files
of llm.c and modded-nanogpt. Vocabularies above 65,536 use uint32 with the magic of llm.c's Llama 3 shards.

    python fineweb.py verify data/NAME        # checks headers, sizes, sha256, token and document counts
    >>> open_dataset("data/NAME").train.read(0, 1024)
"""

import fcntl
import hashlib
import json
import os
import re
import resource
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from babygpt import files
from babygpt.data.tokenizer import Tokenizer
from babygpt.errors import ConfigError, UserError

HEADER_BYTES = 256 * 4
MAGIC_UINT16, VERSION_UINT16 = 20240520, 1  # llm.c dev/data: GPT-2 shards
MAGIC_UINT32, VERSION_UINT32 = 20240801, 7  # llm.c dev/data: Llama-3 shards
MANIFEST = "dataset.json"
SPLITS = ("val", "train")  # in the order of the shard numbers: llm.c's validation shard has number 0


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the dtype of the tokens on disk: little-endian uint16 if every id fits, otherwise uint32."""
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")


def shard_name(name: str, split: str, number: int) -> str:
    return f"{name}_{split}_{number:06d}.bin"


def write_shard(path: str | Path, num_tokens: int, vocab_size: int, pieces: Iterable[np.ndarray]) -> str:
    """Write one shard atomically, locally or at a URL, and return the sha256 of the file.

    `pieces` are integer arrays, (n,) each, with `num_tokens` ids below `vocab_size` in all; ValueError otherwise.
    """
    dtype = token_dtype(vocab_size)
    header = np.zeros(256, dtype="<i4")
    magic = (MAGIC_UINT16, VERSION_UINT16) if dtype.itemsize == 2 else (MAGIC_UINT32, VERSION_UINT32)
    header[:3] = *magic, num_tokens
    digest, written = hashlib.sha256(header.tobytes()), 0
    with files.create(path) as file:
        file.write(header.tobytes())
        for piece in pieces:
            if len(piece) and not 0 <= int(piece.min()) <= int(piece.max()) < vocab_size:
                # checked before the conversion, which would silently wrap a large id into a valid one
                ids = f"ids from {piece.min()} to {piece.max()}"
                raise ValueError(f"{path}: the {ids} are not all in the vocabulary of {vocab_size:,} tokens")
            data = np.ascontiguousarray(piece, dtype=dtype).data
            file.write(data)
            digest.update(data)
            written += len(data)
        if written != num_tokens:
            raise ValueError(f"{path}: {written:,} tokens were written instead of {num_tokens:,}")
    return digest.hexdigest()


def open_shard(path: Path) -> np.ndarray:
    """Return the tokens of a shard as a read-only memory map, (n,) uint16 or uint32; UserError if it is corrupted.

    Reads this module's shards, build-nanogpt's .npy files, and nanoGPT's train.bin and val.bin (uint16, no header).
    """
    if path.suffix == ".npy":
        return _open_npy(path)
    size = path.stat().st_size
    header = np.fromfile(path, dtype="<i4", count=3)
    dtypes = {(MAGIC_UINT16, VERSION_UINT16): "<u2", (MAGIC_UINT32, VERSION_UINT32): "<u4"}
    dtype_name = dtypes.get(tuple(header[:2].tolist()))
    if dtype_name is None and path.name in ("train.bin", "val.bin") and size and size % 2 == 0:
        return np.memmap(path, dtype="<u2", mode="r")
    if len(header) < 3 or dtype_name is None:
        raise UserError(
            f"{path} is not a token shard: it starts with {header[:2].tolist()}, not with magic {MAGIC_UINT16} "
            f"version {VERSION_UINT16} (uint16) or {MAGIC_UINT32} version {VERSION_UINT32} (uint32). "
            "Prepare the data again with fineweb.py."
        )
    num_tokens, dtype = int(header[2]), np.dtype(dtype_name)
    expected = HEADER_BYTES + num_tokens * dtype.itemsize
    if size != expected:
        raise UserError(
            f"{path} is corrupted: its header declares {num_tokens:,} tokens, so it should have {expected:,} bytes, "
            f"but it has {size:,}. Copy or prepare it again."
        )
    if num_tokens == 0:
        return np.empty(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=HEADER_BYTES, shape=(num_tokens,))


def _open_npy(path: Path) -> np.ndarray:
    try:
        shard = np.load(path, mmap_mode="r")
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{path} is corrupted: {error}. Copy or prepare it again.") from None
    if shard.ndim != 1 or shard.dtype != np.dtype("<u2"):
        raise UserError(
            f"{path} is a {shard.dtype} array of shape {shard.shape}, not a uint16 array of shape (n,). Prepare it "
            "again."
        )
    return shard


class Tokens:
    """The shards of a split as one long array of token ids."""

    def __init__(self, shards: list[np.ndarray]):
        self.shards = shards
        self.starts = np.cumsum([0] + [len(shard) for shard in shards])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def read(self, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        """Return tokens start ... stop - 1, (stop - start,) int64, written to `out` if given."""
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"Tokens {start} to {stop - 1} are out of range: there are {len(self)} tokens.")
        out, filled = np.empty(stop - start, np.int64) if out is None else out, 0
        for number, first, end in self.ranges(start, stop):
            out[filled : filled + end - first] = self.shards[number][first:end]
            filled += end - first
        return out

    def ranges(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Yield (shard number, first, end) for tokens start ... stop - 1: tokens first ... end - 1 of each shard."""
        number = int(np.searchsorted(self.starts, start, side="right")) - 1
        while start < stop:
            base, end = int(self.starts[number]), min(stop, int(self.starts[number + 1]))
            yield number, start - base, end - base
            start, number = end, number + 1


@dataclass(frozen=True)
class Dataset:
    """An opened dataset. `manifest` is None if the directory has none, as with shards of other programs."""

    directory: Path
    manifest: dict | None
    train: Tokens
    val: Tokens
    eot_id: int
    vocab_size: int
    tokenizer: str  # argument of `load_tokenizer`: "gpt2" or the path of a tokenizer file
    tokenizer_sha256: str | None
    fingerprint: str  # sha256 of the contents of the shards, independent of the path

    def check_tokenizer(self, tokenizer: Tokenizer, source: str) -> None:
        """Raise a ConfigError if the dataset was prepared with a different tokenizer than that of `source`."""
        if self.tokenizer_sha256 not in (None, tokenizer.sha256) or tokenizer.vocab_size != self.vocab_size:
            raise ConfigError(
                f"{source} and the dataset {self.directory} have different tokenizers, with vocabularies of "
                f"{tokenizer.vocab_size:,} and {self.vocab_size:,} entries. Use a dataset prepared with the tokenizer "
                f"of {source}, or a different model."
            )


def open_dataset(directory: str | Path) -> Dataset:
    """Open the dataset of a directory or URL, and check headers, sizes and manifest without reading tokens.

    Raises UserError if it is corrupted, ConfigError if there is none.
    """
    directory = download(str(directory)) if files.is_remote(directory) else Path(directory)
    if not os.path.isdir(directory):  # unlike Path.is_dir, this is False for a name that is too long
        if os.path.isfile(directory):
            raise ConfigError(f"{directory} is a file, not a dataset. {_preparation(directory)}")
        raise ConfigError(
            f"There is no dataset at {directory}. Prepare it with `python fineweb.py` (its --help lists the sources), "
            "or use a different path (in train.py: --data.dataset)."
        )
    paths = {name: directory / name for name in files.list_names(directory) if _parse_split(name)}
    manifest = read_manifest(directory)
    if manifest is not None:
        listed = [shard["file"] for shard in manifest["shards"]]
        missing, unlisted = [n for n in listed if n not in paths], [n for n in paths if n not in listed]
        if missing or unlisted:
            raise UserError(
                f"{directory} does not match its {MANIFEST}:"
                + "".join(f"\n  {name} is missing" for name in missing)
                + "".join(f"\n  {name} is not in the manifest" for name in unlisted)
                + "\nCopy the dataset again, or prepare it again with fineweb.py."
            )
        counts = {shard["file"]: shard["tokens"] for shard in manifest["shards"]}
    elif (directory / "parts").exists():
        raise UserError(f"{directory} is unfinished. Run the same `python fineweb.py` command again to finish it.")
    if (directory / "meta.pkl").exists():
        raise UserError(
            f"{directory} has a meta.pkl: its tokens are characters, as in nanoGPT's Shakespeare data, not "
            "GPT-2's tokens. Prepare the text with fineweb.py."
        )
    stems = Counter(path.stem for path in paths.values())
    if duplicates := [stem for stem, count in stems.items() if count > 1]:
        raise UserError(f"{directory} has both {duplicates[0]}.bin and {duplicates[0]}.npy. Remove one of them.")
    _allow_open_files(len(paths) + 256)
    shards = {name: open_shard(path) for name, path in paths.items()}
    if not shards:
        raise UserError(f"{directory} has no shards (*_train_*.bin). {_preparation(directory)}")
    for name, shard in shards.items():
        if manifest is not None and counts[name] != len(shard):
            raise UserError(
                f"{directory / name} has {len(shard):,} tokens, but {MANIFEST} lists {counts[name]!r}. Copy or prepare "
                "the dataset again."
            )
        if manifest is not None and shard.dtype != token_dtype(manifest["vocab_size"]):
            raise UserError(
                f"{directory / name} has {shard.dtype.name} tokens, but the vocabulary of {manifest['vocab_size']:,} "
                f"in {MANIFEST} needs {token_dtype(manifest['vocab_size']).name}. Copy or prepare the dataset again."
            )
    splits = {split: Tokens([s for name, s in shards.items() if _parse_split(name) == split]) for split in SPLITS}
    if manifest is not None:
        return Dataset(
            directory, manifest, splits["train"], splits["val"], manifest["eot_id"], manifest["vocab_size"],
            _tokenizer_spec(directory, manifest), manifest["tokenizer"]["sha256"], _fingerprint(manifest["shards"]),
        )  # fmt: skip
    if any(shard.dtype.itemsize != 2 for shard in shards.values()):
        raise UserError(
            f"{directory} has uint32 shards but no {MANIFEST}, so their vocabulary and end-of-text id are unknown. "
            "Prepare the data with fineweb.py."
        )
    samples = [  # without hashes in a manifest, the sizes and both ends of the shards identify the data
        {"file": n, "tokens": len(s), "sha256": hashlib.sha256(s[:4096].tobytes() + s[-4096:].tobytes()).hexdigest()}
        for n, s in shards.items()
    ]
    return Dataset(directory, None, splits["train"], splits["val"], 50256, 50257, "gpt2", None, _fingerprint(samples))


def _preparation(text: Path) -> str:
    """Return how to make a dataset from a file or directory of text."""
    command = ["python", "fineweb.py", "files", "--input", str(text), "--out-dir", f"data/{text.absolute().stem}"]
    return f"If it contains text, prepare it with: {shlex.join(command)}"


def download(url: str) -> Path:
    """Download a dataset, once per node, and return its local directory.

    The sha256 of every shard is checked against the manifest. A file that passed is not read again while its size and
    modification time stay the same. The processes of a node do this one after the other: the first one downloads.
    """
    directory = files.local_directory(url)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with open(directory / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            _download(url.rstrip("/"), directory)
    except UserError as error:
        raise ConfigError(str(error)) from None  # the same on every rank
    return directory


def _download(url: str, directory: Path) -> None:
    quiet = os.environ.get("LOCAL_RANK", "0") != "0"
    manifest = read_manifest(url)
    if manifest is None:  # shards of another program
        if files.list_names(f"{url}/parts"):
            raise UserError(
                f"The dataset at {url} is incomplete. Run the same `python fineweb.py` command again to finish it."
            )
        versions = {name: files.version(f"{url}/{name}") for name in files.list_names(url) if _parse_split(name)}
        if not versions:
            raise UserError(f"There is no dataset at {url}: it has no {MANIFEST} and no shards.")
    else:
        versions = {shard["file"]: shard["sha256"] for shard in manifest["shards"]}
        versions[manifest["tokenizer"]["file"]] = manifest["tokenizer"]["sha256"]
    record_path = directory / "verified.json"  # file -> its size and time here, and its version
    for name in set(files.list_names(directory)) - {*versions, record_path.name, "lock"}:
        (directory / name).unlink()  # of an earlier version of the dataset
    verified = {}
    with suppress(OSError, ValueError):
        verified = json.loads(record_path.read_text())

    def describe(path: Path) -> list:
        return [path.stat().st_size, path.stat().st_mtime_ns, versions[path.name]]

    def is_valid(path: Path) -> bool:
        return manifest is None or files.sha256(path) == versions[path.name]

    def is_current(path: Path) -> bool:
        return verified.get(path.name) == describe(path) or (manifest is not None and is_valid(path))

    files.download(url, sorted(versions), directory, is_current, is_valid, quiet)
    files.write_json(record_path, {name: describe(directory / name) for name in versions})
    if manifest is not None:
        files.write_json(directory / MANIFEST, manifest)


def _allow_open_files(count: int) -> None:
    """Raise the soft limit of open files, usually 1,024 (256 on macOS): every memory map keeps its file open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < count:
        if hard != resource.RLIM_INFINITY and hard < count:
            raise UserError(
                f"The dataset needs {count:,} open files, but only {hard:,} are allowed. Raise the limit: ulimit -n "
                f"{count}"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


def _parse_split(file_name: str) -> str | None:
    """Return the split of a shard from its file name, "train" or "val"; None for other files."""
    match = re.search(r"(?:^|_)(train|val)(_\d+)?\.(bin|npy)$", file_name)
    return match and match[1]


def _tokenizer_spec(directory: Path, manifest: dict) -> str:
    return "gpt2" if manifest["tokenizer"]["name"] == "gpt2" else str(directory / manifest["tokenizer"]["file"])


def _fingerprint(shards: list[dict]) -> str:
    return hashlib.sha256(json.dumps([[s["tokens"], s["sha256"]] for s in shards]).encode()).hexdigest()


def read_manifest(directory: str | Path) -> dict | None:
    """Return the checked contents of `dataset.json`, or None if there is none."""
    path = f"{directory}/{MANIFEST}"
    if not files.exists(path):
        return None
    try:
        manifest = json.loads(files.read_bytes(path))
        manifest["tokenizer"]["name"], manifest["tokenizer"]["sha256"]
        if not (isinstance(manifest["eot_id"], int) and isinstance(manifest["vocab_size"], int)):
            raise TypeError("eot_id and vocab_size must be integers")
        manifest["counts"]["tokens"]["train"], manifest["counts"]["documents"]["kept"]
        for name in [manifest["tokenizer"]["file"], *(shard["file"] for shard in manifest["shards"])]:
            if os.path.basename(name) != name:
                raise ValueError(f"{name!r} is not a plain file name")
        for shard in manifest["shards"]:
            shard["tokens"], shard["documents"], shard["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is corrupted: {error!r}. Copy it again, or prepare the data again.") from None
    return manifest


def verify(directory: str | Path, progress=lambda num_bytes: None) -> dict[str, int]:
    """Compare every byte of a dataset with its manifest; return the number of shards, tokens and documents.

    Checks header, size, sha256, token range and documents (end-of-text tokens) of each shard, the totals, and the
    tokenizer file. UserError lists all problems. `progress` is called with the number of bytes after each read.
    """
    dataset = open_dataset(directory)
    directory = dataset.directory
    if dataset.manifest is None:
        raise UserError(
            f"{directory} has no {MANIFEST}, so its tokens cannot be verified. The headers and sizes of its shards are "
            "valid."
        )
    shards = dataset.manifest["shards"]
    with ThreadPoolExecutor() as threads:  # a disk reads faster than one core hashes
        results = list(threads.map(lambda shard: _verify_shard(dataset, shard, progress), shards))
    problems = [problem for problems, _ in results for problem in problems]
    totals = {"shards": len(shards), "tokens": sum(shard["tokens"] for shard in shards)}
    totals["documents"] = sum(documents for _, documents in results)
    split_tokens: dict[str | None, int] = dict.fromkeys(SPLITS, 0)
    for shard in dataset.manifest["shards"]:
        split_tokens[_parse_split(shard["file"])] += shard["tokens"]
    counts = dataset.manifest["counts"]
    if split_tokens != counts["tokens"]:
        problems.append(
            f"{directory / MANIFEST} lists {counts['tokens']} tokens, but the shards contain {split_tokens}"
        )
    if totals["documents"] != counts["documents"]["kept"]:
        problems.append(
            f"{directory / MANIFEST} lists {counts['documents']['kept']!r} documents, but the shards contain "
            f"{totals['documents']:,}"
        )
    tokenizer = directory / dataset.manifest["tokenizer"]["file"]
    if not tokenizer.exists() or files.sha256(tokenizer) != dataset.manifest["tokenizer"]["sha256"]:
        problems.append(f"{tokenizer} is missing or is not the tokenizer that the data was prepared with")
    if problems:
        problem_lines = "\n  ".join(problems)
        raise UserError(f"{directory} is corrupted:\n  {problem_lines}\nCopy or prepare the dataset again.")
    return totals


def _verify_shard(dataset: Dataset, shard: dict, progress) -> tuple[list[str], int]:
    """Return the problems of a shard and the number of documents that start in it."""
    path, problems = dataset.directory / shard["file"], []
    digest, documents, max_token = hashlib.sha256(), 0, 0
    with open(path, "rb") as file:
        digest.update(file.read(HEADER_BYTES))
        while block := file.read(1 << 22):
            digest.update(block)
            tokens = np.frombuffer(block, token_dtype(dataset.vocab_size))
            documents += int(np.count_nonzero(tokens == dataset.eot_id))
            max_token = max(max_token, int(tokens.max()))
            progress(len(block))
    if digest.hexdigest() != shard["sha256"]:
        problems.append(f"{path}: its sha256 is {digest.hexdigest()}, but {MANIFEST} lists {shard['sha256']}")
    if max_token >= dataset.vocab_size:
        problems.append(f"{path}: token {max_token} is outside the vocabulary of {dataset.vocab_size:,}")
    if documents != shard["documents"]:
        problems.append(
            f"{path}: {MANIFEST} lists {shard['documents']!r} documents, but {documents:,} start in this shard"
        )
    return problems, documents
