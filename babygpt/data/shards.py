"""The data set on disk: token shards, the manifest beside them, and one long array to read them by.

A data set is a folder: `<name>_val_000000.bin`, `<name>_train_000001.bin`, ... and `dataset.json`. A shard
is 256 little-endian int32 of header (magic, version, token count, zeros), then the tokens: byte-compatible
with llm.c's and modded-nanogpt's files. Vocabularies over 65,536 take uint32 under llm.c's Llama-3 magic.

    python fineweb.py verify data/NAME        # every header, size, sha256, token and document count
    >>> open_dataset("data/NAME").train.read(0, 1024)
"""

import fcntl
import hashlib
import json
import os
import re
import resource
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
SPLITS = ("val", "train")  # llm.c numbers the validation shard 0, training goes on from there


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 where every id fits, else uint32 (both little-endian)."""
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")


def shard_name(name: str, split: str, number: int) -> str:
    return f"{name}_{split}_{number:06d}.bin"


def write_shard(path: str | Path, num_tokens: int, vocab_size: int, pieces: Iterable[np.ndarray]) -> str:
    """Writes one shard, here or at a URL, whole or not at all; returns the file's sha256.

    `pieces` are integer arrays, (n,) each, `num_tokens` ids together, every one below `vocab_size`.
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
                # before astype, which would wrap a large id into a valid one in silence
                raise ValueError(f"{path}: token {int(piece.max())} outside the vocabulary of {vocab_size:,}")
            data = np.ascontiguousarray(piece, dtype=dtype).data
            file.write(data)
            digest.update(data)
            written += len(data)
        if written != num_tokens:
            raise ValueError(f"{path}: {written:,} tokens came for a shard of {num_tokens:,}")
    return digest.hexdigest()


def open_shard(path: Path) -> np.ndarray:
    """A shard's tokens as a read-only memory map, (n,) uint16 or uint32; refuses what isn't whole.

    Beside ours, which are llm.c's, it takes build-nanogpt's (.npy) and nanoGPT's (train.bin and val.bin, bare uint16).
    """
    if path.suffix == ".npy":
        return _open_npy(path)
    size = path.stat().st_size
    header = np.fromfile(path, dtype="<i4", count=3)
    kinds = {(MAGIC_UINT16, VERSION_UINT16): "<u2", (MAGIC_UINT32, VERSION_UINT32): "<u4"}
    kind = kinds.get(tuple(header[:2].tolist()))
    if kind is None and path.name in ("train.bin", "val.bin") and size and size % 2 == 0:
        return np.memmap(path, dtype="<u2", mode="r")
    if len(header) < 3 or kind is None:
        raise UserError(
            f"{path} is no token shard: it begins with {header[:2].tolist()}, not with magic {MAGIC_UINT16} "
            f"version {VERSION_UINT16} (uint16) or {MAGIC_UINT32} version {VERSION_UINT32} (uint32). "
            "Prepare the data again with fineweb.py."
        )
    num_tokens, dtype = int(header[2]), np.dtype(kind)
    expected = HEADER_BYTES + num_tokens * dtype.itemsize
    if size != expected:
        raise UserError(
            f"{path} is damaged: its header promises {num_tokens:,} tokens, which is {expected:,} bytes, but "
            f"the file has {size:,}. Copy or prepare it again."
        )
    if num_tokens == 0:
        return np.empty(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=HEADER_BYTES, shape=(num_tokens,))


def _open_npy(path: Path) -> np.ndarray:
    try:
        shard = np.load(path, mmap_mode="r")
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{path} is damaged: {error}. Copy or prepare it again.") from None
    if shard.ndim != 1 or shard.dtype != np.dtype("<u2"):
        raise UserError(f"{path} holds {shard.dtype} of shape {shard.shape}: a shard is (n,) uint16.")
    return shard


class Tokens:
    """The shards of a split as one long array of token ids."""

    def __init__(self, shards: list[np.ndarray]):
        self.shards = shards
        self.starts = np.cumsum([0] + [len(shard) for shard in shards])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def read(self, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        """Return tokens start ... stop - 1, (stop - start,) int64, in `out` if it is given."""
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"tokens {start} to {stop} of {len(self)}")
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
    """An opened data set. `manifest` is None where somebody else's shards came without one."""

    directory: Path
    manifest: dict | None
    train: Tokens
    val: Tokens
    eot_id: int
    vocab_size: int
    tokenizer: str  # what `load_tokenizer` takes: "gpt2" or the path of a tokenizer file
    tokenizer_sha256: str | None
    fingerprint: str  # sha256 over the shards' contents, the same wherever the folder lies

    def check_tokenizer(self, tokenizer: Tokenizer, source: str) -> None:
        """Raise a ConfigError if the data set was prepared with another tokenizer than that of `source`."""
        if self.tokenizer_sha256 not in (None, tokenizer.sha256) or tokenizer.vocab_size != self.vocab_size:
            raise ConfigError(
                f"{source} and the data set {self.directory} have different tokenizers, with vocabularies of "
                f"{tokenizer.vocab_size:,} and {self.vocab_size:,} entries. Use a data set prepared with the tokenizer "
                f"of {source}, or another model."
            )


def open_dataset(folder: str | Path) -> Dataset:
    """Open the data set of a directory or URL, and check headers, sizes and manifest without reading tokens.

    Raises UserError if it is corrupted, ConfigError if there is none.
    """
    folder = pull(str(folder)) if files.is_remote(folder) else Path(folder)
    if not os.path.isdir(folder):  # unlike Path.is_dir, this is False for a name that is too long
        raise ConfigError(
            f"There is no data set at {folder}. Prepare it with `python fineweb.py` (its --help lists the sources), "
            "or use another --data.dataset."
        )
    found = {name: folder / name for name in files.list_names(folder) if _split_of(name)}
    manifest = read_manifest(folder)
    if manifest is not None:
        named = [shard["file"] for shard in manifest["shards"]]
        missing, foreign = [n for n in named if n not in found], [n for n in found if n not in named]
        if missing or foreign:
            raise UserError(
                f"{folder} doesn't match its {MANIFEST}:"
                + "".join(f"\n  {name} is missing" for name in missing)
                + "".join(f"\n  {name} is not in the manifest" for name in foreign)
                + "\nCopy the folder again, or prepare it again with fineweb.py."
            )
        counts = {shard["file"]: shard["tokens"] for shard in manifest["shards"]}
    elif (folder / "parts").exists():
        raise UserError(f"{folder} is not finished. Give the command that began it again: python fineweb.py ...")
    if (folder / "meta.pkl").exists():
        raise UserError(f"{folder} has a meta.pkl: its tokens are nanoGPT's characters, not GPT-2's. Prepare it anew.")
    stems = Counter(path.stem for path in found.values())
    if twice := [name for name, count in stems.items() if count > 1]:
        raise UserError(f"{folder} holds {twice[0]} as .bin and as .npy. Move one of them away.")
    _allow_open_files(len(found) + 256)
    opened = {name: open_shard(path) for name, path in found.items()}
    if not opened:
        raise UserError(f"{folder} holds no shards (*_train_*.bin). Prepare it with fineweb.py.")
    for name, shard in opened.items():
        if manifest is not None and counts[name] != len(shard):
            raise UserError(f"{folder / name} has {len(shard):,} tokens, its {MANIFEST} says {counts[name]!r}.")
        if manifest is not None and shard.dtype != token_dtype(manifest["vocab_size"]):
            raise UserError(
                f"{folder / name} holds {shard.dtype.name} tokens, but a vocabulary of {manifest['vocab_size']:,} "
                f"({MANIFEST}) is stored as {token_dtype(manifest['vocab_size']).name}."
            )
    splits = {split: Tokens([s for name, s in opened.items() if _split_of(name) == split]) for split in SPLITS}
    if manifest is not None:
        return Dataset(
            folder, manifest, splits["train"], splits["val"], manifest["eot_id"], manifest["vocab_size"],
            _tokenizer_spec(folder, manifest), manifest["tokenizer"]["sha256"], _fingerprint(manifest["shards"]),
        )  # fmt: skip
    if any(shard.dtype.itemsize != 2 for shard in opened.values()):
        raise UserError(
            f"{folder} holds uint32 shards but no {MANIFEST}, so their vocabulary and end-of-text id are unknown."
        )
    edges = [  # no hashes to go by: sizes and both ends of each shard tell data sets apart
        {"file": n, "tokens": len(s), "sha256": hashlib.sha256(s[:4096].tobytes() + s[-4096:].tobytes()).hexdigest()}
        for n, s in opened.items()
    ]
    return Dataset(folder, None, splits["train"], splits["val"], 50256, 50257, "gpt2", None, _fingerprint(edges))


def pull(url: str) -> Path:
    """Brings a data set from a URL to this machine, once a node, and returns its folder here.

    Every shard is held against the manifest's sha256; one that was found sound is not read again as long as its size
    and time stay. The processes of a node take turns: the first one fetches, the others find everything there.
    """
    folder = files.local_directory(url)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            _pull(url.rstrip("/"), folder)
    except UserError as error:
        raise ConfigError(str(error)) from None  # every rank finds the same
    return folder


def _pull(url: str, folder: Path) -> None:
    quiet = os.environ.get("LOCAL_RANK", "0") != "0"
    manifest = read_manifest(url)
    if manifest is None:  # somebody else's
        if files.list_names(f"{url}/parts"):
            raise UserError(f"{url} is not finished. Give the command that began it again: python fineweb.py ...")
        wanted = {name: files.state(f"{url}/{name}") for name in files.list_names(url) if _split_of(name)}
        if not wanted:
            raise UserError(f"there is no data set at {url}: no {MANIFEST}, and no shards.")
    else:
        wanted = {shard["file"]: shard["sha256"] for shard in manifest["shards"]}
        wanted[manifest["tokenizer"]["file"]] = manifest["tokenizer"]["sha256"]
    record = folder / "sound.json"  # of each file that was found sound: its size and time here, what it should be
    for name in set(files.list_names(folder)) - {*wanted, record.name, "lock"}:
        (folder / name).unlink()  # of another state of this data set
    known = {}
    with suppress(OSError, ValueError):
        known = json.loads(record.read_text())

    def seen(path: Path) -> list:
        return [path.stat().st_size, path.stat().st_mtime_ns, wanted[path.name]]

    def is_sound(path: Path) -> bool:
        return manifest is None or files.sha256(path) == wanted[path.name]

    def is_here(path: Path) -> bool:
        return known.get(path.name) == seen(path) or (manifest is not None and is_sound(path))

    files.pull(url, sorted(wanted), folder, is_here, is_sound, quiet)
    files.write_json(record, {name: seen(folder / name) for name in wanted})
    if manifest is not None:
        files.write_json(folder / MANIFEST, manifest)


def _allow_open_files(count: int) -> None:
    """A memory map keeps its file open, and the usual limit of 1,024 (256 on macOS) is soft."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < count:
        if hard != resource.RLIM_INFINITY and hard < count:
            raise UserError(f"{count:,} files must be open at once, {hard:,} may. Raise the limit: ulimit -n {count}")
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


def _split_of(file_name: str) -> str | None:
    """train or val, as a shard's name ends; None for other files."""
    match = re.search(r"(?:^|_)(train|val)(_\d+)?\.(bin|npy)$", file_name)
    return match and match[1]


def _tokenizer_spec(folder: Path, manifest: dict) -> str:
    return "gpt2" if manifest["tokenizer"]["name"] == "gpt2" else str(folder / manifest["tokenizer"]["file"])


def _fingerprint(shards: list[dict]) -> str:
    return hashlib.sha256(json.dumps([[s["tokens"], s["sha256"]] for s in shards]).encode()).hexdigest()


def read_manifest(folder: str | Path) -> dict | None:
    """The contents of `dataset.json`, or None where there is none."""
    path = f"{folder}/{MANIFEST}"
    if not files.exists(path):
        return None
    try:
        manifest = json.loads(files.read_bytes(path))
        manifest["tokenizer"]["name"], manifest["tokenizer"]["sha256"]
        if not (isinstance(manifest["eot_id"], int) and isinstance(manifest["vocab_size"], int)):
            raise TypeError("eot_id and vocab_size are numbers")
        manifest["counts"]["tokens"]["train"], manifest["counts"]["documents"]["kept"]
        for name in [manifest["tokenizer"]["file"], *(shard["file"] for shard in manifest["shards"])]:
            if os.path.basename(name) != name:
                raise ValueError(f"{name!r} is no file's name")
        for shard in manifest["shards"]:
            shard["tokens"], shard["documents"], shard["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error!r}). Copy it or prepare the data again.") from None
    return manifest


def verify(folder: str | Path, progress=lambda num_bytes: None) -> dict[str, int]:
    """Reads every byte of a data set and holds it against its manifest; returns tokens and documents.

    Header, size, sha256, token range and number of documents (end-of-text tokens) of each shard, the sums, and the
    tokenizer's file. UserError lists all that is wrong. `progress` is called with the bytes just read.
    """
    dataset = open_dataset(folder)
    folder = dataset.directory
    if dataset.manifest is None:
        raise UserError(f"{folder} has no {MANIFEST} to verify it by: its sizes fit its headers, no more is known.")
    shards = dataset.manifest["shards"]
    with ThreadPoolExecutor() as threads:  # a disk gives more than one core hashes
        found = list(threads.map(lambda shard: _verify_shard(dataset, shard, progress), shards))
    problems = [problem for problems, _ in found for problem in problems]
    totals = {"shards": len(shards), "tokens": sum(shard["tokens"] for shard in shards)}
    totals["documents"] = sum(documents for _, documents in found)
    counted: Counter[str | None] = Counter(dict.fromkeys(SPLITS, 0))
    for shard in dataset.manifest["shards"]:
        counted[_split_of(shard["file"])] += shard["tokens"]
    if counted != dataset.manifest["counts"]["tokens"]:
        problems.append(f"{folder / MANIFEST}: its shards have {counted} tokens, its counts say otherwise")
    if totals["documents"] != dataset.manifest["counts"]["documents"]["kept"]:
        problems.append(
            f"{folder / MANIFEST}: its shards have {totals['documents']:,} documents, its counts say otherwise"
        )
    tokenizer = folder / dataset.manifest["tokenizer"]["file"]
    if not tokenizer.exists() or files.sha256(tokenizer) != dataset.manifest["tokenizer"]["sha256"]:
        problems.append(f"{tokenizer} is missing or not the tokenizer that the data was made with")
    if problems:
        raise UserError("the data set is damaged:\n  " + "\n  ".join(problems) + "\nPrepare or copy it again.")
    return totals


def _verify_shard(dataset: Dataset, shard: dict, progress) -> tuple[list[str], int]:
    """What is wrong with a shard, and how many documents begin in it."""
    path, problems = dataset.directory / shard["file"], []
    digest, documents, highest = hashlib.sha256(), 0, 0
    with open(path, "rb") as file:
        digest.update(file.read(HEADER_BYTES))
        while block := file.read(1 << 22):
            digest.update(block)
            tokens = np.frombuffer(block, token_dtype(dataset.vocab_size))
            documents += int(np.count_nonzero(tokens == dataset.eot_id))
            highest = max(highest, int(tokens.max()))
            progress(len(block))
    if digest.hexdigest() != shard["sha256"]:
        problems.append(f"{path}: sha256 is {digest.hexdigest()}, the manifest says {shard['sha256']}")
    if highest >= dataset.vocab_size:
        problems.append(f"{path}: token {highest} outside the vocabulary of {dataset.vocab_size:,}")
    if documents != shard["documents"]:
        problems.append(f"{path}: {documents:,} documents begin in it, the manifest says {shard['documents']!r}")
    return problems, documents
