"""Plan a data set: which documents are kept, in which split, and where their tokens go.

The plan reads only the indexes of the tokenize stage. An index (`parts/N.npz`) has one row per document: xxh3-128 of
its text as two uint64, tokens including EOT, bytes of UTF-8, and the decision of the filters. Duplicates and validation
documents are found by hash, one bucket of hashes at a time. Everything else is done part by part, so that memory holds
two bytes per document and one bucket.
"""

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from babygpt import files
from babygpt.data.filters import DUPLICATE, EMPTY, FILTERED, KEPT
from babygpt.errors import UserError

VALIDATION = 255  # a decision, next to those of filters.py
CODES = {"val": VALIDATION, "train": KEPT}  # decision on the documents of a split
DEFAULT_VAL_TOKENS = 11_000_000  # the validation of a training run reads the first 20 x 524,288
BUCKET_ROWS = 1 << 22  # documents sorted at once, in about 400 MB
ROW = np.dtype([("high", "u8"), ("low", "u8"), ("document", "u8"), ("tokens", "u4")])
Piece = tuple[str, np.ndarray, int, int]  # tokens of a part, see `Plan.pieces`


def load_index(stem: str, names: tuple[str, ...] = ("hash", "tokens", "bytes", "decision")) -> dict[str, np.ndarray]:
    """Load arrays of a part's index: `hash` (documents, 2), `tokens`, `bytes` and `decision` (documents,)."""
    try:
        with np.load(io.BytesIO(files.read_bytes(f"{stem}.npz"))) as file:
            return {name: file[name] for name in names}
    except (BadZipFile, ValueError, KeyError) as error:
        raise UserError(f"{stem}.npz is corrupted ({error}). Delete it and run the same command again.") from None


class Buckets:
    """The kept documents, sorted by hash, in memory or in files. Marks duplicates in `decisions` (documents,) uint8."""

    def __init__(self, decisions: np.ndarray, directory: Path):
        self.bits = max(0, (len(decisions) - 1) // BUCKET_ROWS).bit_length()  # the first bits of a hash are its bucket
        self.decisions, self.directory = decisions, directory
        self.buffer, self.num_buffered = [np.empty(0, ROW)], 0

    def add(self, index: dict[str, np.ndarray], first_document: int) -> None:
        kept = np.flatnonzero(index["decision"] == KEPT)
        rows = np.empty(len(kept), ROW)
        rows["high"], rows["low"] = index["hash"][kept].T
        rows["document"], rows["tokens"] = first_document + kept, index["tokens"][kept]
        self.buffer.append(rows)
        self.num_buffered += len(rows)
        if self.bits and self.num_buffered >= BUCKET_ROWS:
            self.flush()

    def flush(self) -> None:
        """Append the buffered rows to the files of their buckets."""
        rows = self.drop_duplicates(np.concatenate(self.buffer))
        self.buffer, self.num_buffered = [np.empty(0, ROW)], 0
        bucket = rows["high"] >> np.uint64(64 - self.bits)
        for i, piece in enumerate(np.split(rows, np.searchsorted(bucket, np.arange(1, 2**self.bits, dtype=np.uint64)))):
            with open(self.directory / f"bucket-{i}", "ab") as file:
                piece.tofile(file)

    def drop_duplicates(self, rows: np.ndarray) -> np.ndarray:
        """Sort rows by hash and position; drop and mark all but the first of each hash."""
        rows = rows[np.lexsort((rows["document"], rows["low"], rows["high"]))]
        is_duplicate = np.zeros(len(rows), bool)
        is_duplicate[1:] = (rows["high"][1:] == rows["high"][:-1]) & (rows["low"][1:] == rows["low"][:-1])
        self.decisions[rows["document"][is_duplicate]] = DUPLICATE
        return rows[~is_duplicate]

    def __iter__(self) -> Iterator[np.ndarray]:
        if self.bits:
            self.flush()
        for i in range(2**self.bits):
            rows = np.fromfile(self.directory / f"bucket-{i}", ROW) if self.bits else np.concatenate(self.buffer)
            yield self.drop_duplicates(rows)


@dataclass
class Plan:
    """The decision on every document, and where the tokens of every part go."""

    stems: list[str]  # of the parts, in source order
    decisions: np.ndarray  # (documents,) uint8
    first_document: np.ndarray  # (parts + 1,), each part's first document
    first_token: dict[str, np.ndarray]  # split -> (parts + 1,), the position of each part's first token in the split
    documents: dict[str, int]  # decision -> documents
    filtered_by: dict[str, int]  # filter -> documents
    text_bytes: dict[str, int]  # split -> bytes of UTF-8

    @property
    def tokens(self) -> dict[str, int]:
        return {split: int(first[-1]) for split, first in self.first_token.items()}

    def pieces(self, split: str, begin: int, end: int) -> list[Piece]:
        """Return (stem, in_split, start, stop) of the parts that hold tokens begin ... end - 1 of a split, in order.

        `in_split`, (documents of the part,) bool, selects documents; their tokens start ... stop - 1 are those.
        """
        first, pieces = self.first_token[split], []
        for i in range(int(np.searchsorted(first, begin, "right")) - 1, int(np.searchsorted(first, end, "left"))):
            in_split = self.decisions[self.first_document[i] : self.first_document[i + 1]] == CODES[split]
            start, stop = max(begin, int(first[i])), min(end, int(first[i + 1]))
            if start < stop:
                pieces.append((self.stems[i], in_split, start - int(first[i]), stop - int(first[i])))
        return pieces

    def report(self, val_tokens: int | None) -> None:
        """Print the number of documents by decision; UserError if no document is kept."""
        if self.documents["kept"] == 0 and self.documents["filtered"]:
            raise UserError("the source has no text that passes the filters. Use lower thresholds (--min-...).")
        if self.documents["kept"] == 0:
            raise UserError("the source has no text. Use another source or --text-column.")
        if val_tokens and self.tokens["val"] > 2 * val_tokens:
            found = f"{self.tokens['val']:,} validation tokens instead of {val_tokens:,}"
            print(f"warning: {found}: documents are not split, and some are large.")
        print("documents: " + ", ".join(f"{count:,} {name}" for name, count in self.documents.items()))


def plan_shards(stems: list[str], val_tokens: int | None, max_tokens: int | None, scratch: Path) -> Plan:
    """Drop duplicates, apply `max_tokens`, choose validation documents, and place every document.

    Of equal documents the first in source order is kept. The smallest hashes are for validation: whole documents until
    they have `val_tokens` tokens (None: 5 % of all, at most 11 M), but one document is always left for training.
    """
    decisions = [load_index(stem, ("decision",))["decision"] for stem in stems]
    first_document = np.cumsum([0, *map(len, decisions)])
    files.remove(scratch)  # of a killed run
    scratch.mkdir(parents=True)
    buckets = Buckets(np.concatenate([np.empty(0, np.uint8), *decisions]), scratch)
    for stem, begin in zip(stems, first_document.tolist(), strict=False):
        buckets.add(load_index(stem), begin)
    for _ in buckets:
        pass  # marks the duplicates
    seen, kept, tokens = apply_max_tokens(stems, buckets.decisions, max_tokens or math.inf)
    wanted = min(DEFAULT_VAL_TOKENS, tokens // 20) if val_tokens is None else val_tokens
    choose_validation(buckets, buckets.decisions[:seen], kept, wanted)
    return place(stems, buckets.decisions[:seen], np.minimum(first_document, seen))


def apply_max_tokens(stems: list[str], decisions: np.ndarray, max_tokens: float) -> tuple[int, int, int]:
    """Count all documents, kept documents and kept tokens up to the document that reaches `max_tokens`."""
    seen = kept = total = 0
    for stem in stems:
        tokens = load_index(stem, ("tokens",))["tokens"]
        rows = np.flatnonzero(decisions[seen : seen + len(tokens)] == KEPT)
        totals = total + np.cumsum(tokens[rows], dtype=np.int64)
        if len(rows) and totals[-1] >= max_tokens:
            last = int(np.searchsorted(totals, max_tokens))
            return seen + int(rows[last]) + 1, kept + last + 1, int(totals[last])
        seen, kept, total = seen + len(tokens), kept + len(rows), int(totals[-1]) if len(rows) else total
    return seen, kept, total


def choose_validation(buckets: Buckets, decisions: np.ndarray, kept: int, wanted: int) -> None:
    """Mark documents by smallest hash in `decisions` until they have `wanted` tokens; leave one of `kept` documents."""
    for rows in buckets:
        rows = rows[rows["document"] < len(decisions)]
        rows = rows[decisions[rows["document"]] == KEPT]
        enough = int(np.searchsorted(np.cumsum(rows["tokens"], dtype=np.int64), wanted)) + 1 if wanted > 0 else 0
        chosen = rows[: min(enough, kept - 1)]
        decisions[chosen["document"]] = VALIDATION
        wanted, kept = wanted - int(chosen["tokens"].sum(dtype=np.int64)), kept - len(chosen)
        if wanted <= 0:
            break


def place(stems: list[str], decisions: np.ndarray, first_document: np.ndarray) -> Plan:
    """Compute where each part's tokens go and count documents by decision."""
    first_token = {split: np.zeros(len(stems) + 1, np.int64) for split in CODES}
    text_bytes, counts = dict.fromkeys(CODES, 0), np.zeros(256, np.int64)
    for i, stem in enumerate(stems):
        index, decision = load_index(stem, ("tokens", "bytes")), decisions[first_document[i] : first_document[i + 1]]
        counts += np.bincount(decision, minlength=256)
        for split, code in CODES.items():
            in_split = np.flatnonzero(decision == code)
            first_token[split][i + 1] = first_token[split][i] + index["tokens"][in_split].sum(dtype=np.int64)
            text_bytes[split] += int(index["bytes"][in_split].sum())
    filtered_by = {name: int(counts[code]) for name, code in FILTERED.items() if counts[code]}
    documents = {
        "seen": len(decisions), "kept": int(counts[KEPT] + counts[VALIDATION]), "empty": int(counts[EMPTY]),
        "filtered": sum(filtered_by.values()), "duplicate": int(counts[DUPLICATE]), "train": int(counts[KEPT]),
        "val": int(counts[VALIDATION]),
    }  # fmt: skip
    return Plan(stems, decisions, first_document, first_token, documents, filtered_by, text_bytes)


def token_ranges(tokens: np.ndarray, in_split: np.ndarray, start: int, stop: int) -> tuple[np.ndarray, int]:
    """Find a Piece in its part, given the length of each of the part's documents, `tokens` (documents,).

    Returns (ranges, 2) int64, with adjacent ranges joined, and the number of documents that start in the piece.
    """
    tokens = tokens[: len(in_split)].astype(np.int64)  # max_tokens may have cut the part
    end, tokens = np.cumsum(tokens)[in_split], tokens[in_split]
    offsets = np.cumsum(tokens) - tokens  # of the documents in the split
    overlaps = (offsets + tokens > start) & (offsets < stop)
    begin = (end - tokens + np.maximum(start - offsets, 0))[overlaps]
    end = (end - np.maximum(offsets + tokens - stop, 0))[overlaps]
    is_first = np.append(True, begin[1:] != end[:-1])
    ranges = np.stack([begin[is_first], end[np.append(np.flatnonzero(is_first)[1:], len(end)) - 1]], axis=1)
    return ranges, int(np.count_nonzero((offsets >= start) & (offsets < stop)))
