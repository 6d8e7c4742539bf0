"""The plan of a data set: which documents stay, in which split, and where. From the map's indexes alone.

An index (`parts/N.npz`) has a row a document: xxh3-128 of its text as two uint64, tokens with EOT, bytes of
UTF-8, and what becomes of it. Doubles are found and validation is chosen by hash, a bucket of hashes at a time, and
everything else goes part by part, so that one byte a document is all that has to fit into memory.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from babygpt import files
from babygpt.data.filters import DUPLICATE, EMPTY, FILTERED, KEPT
from babygpt.errors import UserError

VALIDATES = 255  # what becomes of a document, beside those of filters.py
CODES = {"val": VALIDATES, "train": KEPT}
DEFAULT_VAL_TOKENS = 11_000_000  # the validation of a run reads the first 20 x 524,288
BUCKET_ROWS = 1 << 22  # documents sorted at once: about 400 MB
ROW = np.dtype([("high", "u8"), ("low", "u8"), ("document", "u8"), ("tokens", "u4")])


def load_index(stem: str, names: tuple[str, ...] = ("hash", "tokens", "bytes", "decision")) -> dict[str, np.ndarray]:
    """The index of a part: `hash` (n, 2), `tokens`, `bytes` and `decision` (n,)."""
    try:
        with np.load(io.BytesIO(files.read_bytes(f"{stem}.npz"))) as file:
            return {name: file[name] for name in names}
    except (BadZipFile, ValueError, KeyError) as error:
        raise UserError(f"{stem}.npz is damaged ({error}). Delete it: the same command makes it anew.") from None


class Buckets:
    """The documents that the filters left, by hash: bucket after bucket, each sorted by hash and place."""

    def __init__(self, decisions: np.ndarray, folder: Path):
        """`decisions` (documents,) uint8 learns which documents are doubles; `folder` is for what memory can't hold."""
        self.bits = max(0, (len(decisions) - 1) // BUCKET_ROWS).bit_length()
        self.decisions, self.folder = decisions, folder
        self.waiting, self.num_waiting = [np.empty(0, ROW)], 0

    def add(self, index: dict[str, np.ndarray], first_document: int) -> None:
        kept = np.flatnonzero(index["decision"] == KEPT)
        rows = np.empty(len(kept), ROW)
        rows["high"], rows["low"] = index["hash"][kept].T
        rows["document"], rows["tokens"] = first_document + kept, index["tokens"][kept]
        self.waiting.append(rows)
        self.num_waiting += len(rows)
        if self.bits and self.num_waiting >= BUCKET_ROWS:
            self.flush()

    def flush(self) -> None:
        """Puts what waits into the files of the buckets, by the first bits of the hash."""
        rows = self.firsts(np.concatenate(self.waiting))
        self.waiting, self.num_waiting = [np.empty(0, ROW)], 0
        bucket = rows["high"] >> np.uint64(64 - self.bits)
        for i, piece in enumerate(np.split(rows, np.searchsorted(bucket, np.arange(1, 2**self.bits, dtype=np.uint64)))):
            with open(self.folder / f"bucket-{i}", "ab") as file:
                piece.tofile(file)

    def firsts(self, rows: np.ndarray) -> np.ndarray:
        """The rows by hash and place, without doubles of earlier ones, which are marked as such."""
        rows = rows[np.lexsort((rows["document"], rows["low"], rows["high"]))]
        again = np.zeros(len(rows), bool)
        again[1:] = (rows["high"][1:] == rows["high"][:-1]) & (rows["low"][1:] == rows["low"][:-1])
        self.decisions[rows["document"][again]] = DUPLICATE
        return rows[~again]

    def __iter__(self) -> Iterator[np.ndarray]:
        if self.bits:
            self.flush()
        for i in range(2**self.bits):
            rows = np.fromfile(self.folder / f"bucket-{i}", ROW) if self.bits else np.concatenate(self.waiting)
            yield self.firsts(rows)


@dataclass
class Plan:
    """What becomes of every document, and where the parts' tokens go.

    `decisions` (documents,) uint8 in source order; `first` (parts + 1,) numbers of the parts' first documents;
    `starts[split]` (parts + 1,) the parts' first tokens in the split.
    """

    stems: list[str]
    decisions: np.ndarray
    first: np.ndarray
    starts: dict[str, np.ndarray]
    documents: dict[str, int]
    filtered_by: dict[str, int]
    bytes: dict[str, int]

    @property
    def tokens(self) -> dict[str, int]:
        return {split: int(starts[-1]) for split, starts in self.starts.items()}

    def pieces(self, split: str, begin: int, end: int) -> list[tuple[str, np.ndarray, int, int]]:
        """What makes the split's tokens begin ... end - 1: of each part in turn its stem, for each of its documents
        whether it is in the split, and which tokens of those: from the first to the last plus one."""
        starts, found = self.starts[split], []
        for i in range(int(np.searchsorted(starts, begin, "right")) - 1, int(np.searchsorted(starts, end, "left"))):
            mine = self.decisions[self.first[i] : self.first[i + 1]] == CODES[split]
            first, last = max(begin, int(starts[i])), min(end, int(starts[i + 1]))
            if first < last:
                found.append((self.stems[i], mine, first - int(starts[i]), last - int(starts[i])))
        return found


def decide(stems: list[str], scratch: Path) -> tuple[Buckets, np.ndarray, np.ndarray]:
    """What becomes of each document by the filters and by doubles, of which the first stays: the documents by hash,
    the decisions and the parts' first documents."""
    counts = []
    for stem in stems:
        counts.append(len(load_index(stem, ("decision",))["decision"]))
    first = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    files.remove(scratch)  # of a killed run
    scratch.mkdir(parents=True)
    decisions = np.empty(first[-1], np.uint8)
    buckets = Buckets(decisions, scratch)
    for stem, a, b in zip(stems, first[:-1], first[1:], strict=True):
        index = load_index(stem)
        decisions[a:b] = index["decision"]
        buckets.add(index, a)
    for _ in buckets:
        pass  # marks the doubles
    return buckets, decisions, first


def plan(stems: list[str], val_tokens: int | None, max_tokens: int | None, scratch: Path) -> Plan:
    """The first of equal documents stays; source order up to max_tokens; the smallest hashes validate."""
    buckets, decisions, first = decide(stems, scratch)
    seen, total, kept = len(decisions), 0, 0
    for stem, a in zip(stems, first[:-1].tolist(), strict=True):
        tokens = load_index(stem, ("tokens",))["tokens"].astype(np.int64)
        stays = np.flatnonzero(decisions[a : a + len(tokens)] == KEPT)
        if max_tokens is not None and len(stays) and total + tokens[stays].sum() >= max_tokens:
            stays = stays[: int(np.searchsorted(np.cumsum(tokens[stays]), max_tokens - total)) + 1]
            seen = a + int(stays[-1]) + 1
        total, kept = total + int(tokens[stays].sum()), kept + len(stays)
        if max_tokens is not None and total >= max_tokens:
            break
    decisions = decisions[:seen]

    wanted = min(DEFAULT_VAL_TOKENS, total // 20) if val_tokens is None else val_tokens
    for rows in buckets:
        rows = rows[rows["document"] < seen]
        rows = rows[decisions[rows["document"]] == KEPT]
        enough = int(np.searchsorted(np.cumsum(rows["tokens"], dtype=np.int64), wanted)) + 1 if wanted > 0 else 0
        chosen = rows[: min(enough, kept - 1)]  # one is left to train on
        decisions[chosen["document"]] = VALIDATES
        wanted, kept = wanted - int(chosen["tokens"].sum(dtype=np.int64)), kept - len(chosen)
        if wanted <= 0:
            break

    first = np.minimum(first, seen)
    starts = {split: np.zeros(len(stems) + 1, np.int64) for split in CODES}
    sizes, found = dict.fromkeys(CODES, 0), np.zeros(256, np.int64)
    for i, stem in enumerate(stems):
        index, decision = load_index(stem, ("tokens", "bytes")), decisions[first[i] : first[i + 1]]
        found += np.bincount(decision, minlength=256)
        for split, code in CODES.items():
            mine = np.flatnonzero(decision == code)
            starts[split][i + 1] = starts[split][i] + index["tokens"][mine].sum(dtype=np.int64)
            sizes[split] += int(index["bytes"][mine].sum())
    counts = {"seen": seen, "kept": int(found[KEPT] + found[VALIDATES]), "empty": int(found[EMPTY])}
    counts |= {"filtered": int(found[list(FILTERED.values())].sum()), "duplicate": int(found[DUPLICATE])}
    counts |= {"train": int(found[KEPT]), "val": int(found[VALIDATES])}
    filtered_by = {name: int(found[code]) for name, code in FILTERED.items() if found[code]}
    return Plan(stems, decisions, first, starts, counts, filtered_by, sizes)


def runs(tokens: np.ndarray, mine: np.ndarray, first: int, last: int) -> tuple[np.ndarray, int]:
    """Where in a part the tokens first ... last - 1 of those documents lie that are `mine`, and how many of them
    begin there: (n, 2) int64 of ranges, neighbours in one.

    `tokens` (documents,) of the part's documents, which lie in it one behind the other; `mine` may end before them.
    """
    tokens = tokens[: len(mine)].astype(np.int64)
    end, tokens = np.cumsum(tokens)[mine], tokens[mine]
    at = np.cumsum(tokens) - tokens  # of a document among those that are mine
    touched = (at + tokens > first) & (at < last)
    begin = (end - tokens + np.maximum(first - at, 0))[touched]
    end = (end - np.maximum(at + tokens - last, 0))[touched]
    fresh = np.append(True, begin[1:] != end[:-1])
    ranges = np.stack([begin[fresh], end[np.append(np.flatnonzero(fresh)[1:], len(end)) - 1]], axis=1)
    return ranges, int(np.count_nonzero((at >= first) & (at < last)))
