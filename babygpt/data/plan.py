"""Plan a dataset: which documents are kept, in which split, and where their tokens go.

The plan reads only the indexes of the tokenize stage, and the tokens of a document that is divided. An index
(`parts/N.npz`) has one row per document: xxh3-128 of its text as two uint64, tokens including EOT, bytes of UTF-8, and
the decision of the filters. Duplicates and validation documents are found by hash, one bucket of hashes at a time.
Everything else is done part by part, so the plan needs memory for two bytes per document and one bucket.
"""

import io
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from babygpt import files
from babygpt.data.filters import DUPLICATE, EMPTY, FILTERED, KEPT
from babygpt.data.shards import token_dtype
from babygpt.data.tokenizer import Tokenizer
from babygpt.errors import UserError

VALIDATION, DIVIDED = 255, 254  # decisions, in addition to those of filters.py
SPLIT_DECISIONS = {"val": VALIDATION, "train": KEPT}  # split -> decision on its documents
DEFAULT_VAL_TOKENS = 11_000_000  # the validation of a training run reads the first 20 x 524,288
NAMED = "the documents that --val-input or the source names"  # a rule, for dataset.json
MIN_DIVIDED_TOKENS = 1000  # shorter documents are never divided
BUCKET_ROWS = 1 << 22  # documents sorted at once, in about 400 MB
BUCKET_DTYPE = np.dtype([("high", "u8"), ("low", "u8"), ("document", "u8"), ("tokens", "u4")])
Piece = tuple[str, np.ndarray, int, int]  # (stem, in_split, start, stop), see `Plan.pieces`


def load_index(stem: str, names: tuple[str, ...] = ("hash", "tokens", "bytes", "decision")) -> dict[str, np.ndarray]:
    """Load arrays of a part's index: `hash` (documents, 2), `tokens`, `bytes` and `decision` (documents,)."""
    try:
        with np.load(io.BytesIO(files.read_bytes(f"{stem}.npz"))) as file:
            return {name: file[name] for name in names}
    except (BadZipFile, ValueError, KeyError) as error:
        raise UserError(f"{stem}.npz is corrupted ({error}). Delete it and run the same command again.") from None


class Buckets:
    """The kept documents, sorted by hash, in memory or in files. Duplicates are marked in `decisions`, (documents,)."""

    def __init__(self, decisions: np.ndarray, directory: Path):
        self.bits = max(0, (len(decisions) - 1) // BUCKET_ROWS).bit_length()  # the bucket is the first bits of the hash
        self.decisions, self.directory = decisions, directory
        self.buffer, self.num_buffered = [np.empty(0, BUCKET_DTYPE)], 0

    def add(self, index: dict[str, np.ndarray], first_document: int) -> None:
        kept = np.flatnonzero(index["decision"] == KEPT)
        rows = np.empty(len(kept), BUCKET_DTYPE)
        rows["high"], rows["low"] = index["hash"][kept].T
        rows["document"], rows["tokens"] = first_document + kept, index["tokens"][kept]
        self.buffer.append(rows)
        self.num_buffered += len(rows)
        if self.bits and self.num_buffered >= BUCKET_ROWS:
            self.flush()

    def flush(self) -> None:
        """Append the buffered rows to the files of their buckets."""
        rows = self.drop_duplicates(np.concatenate(self.buffer))
        self.buffer, self.num_buffered = [np.empty(0, BUCKET_DTYPE)], 0
        bucket = rows["high"] >> np.uint64(64 - self.bits)
        for i, piece in enumerate(np.split(rows, np.searchsorted(bucket, np.arange(1, 2**self.bits, dtype=np.uint64)))):
            with open(self.directory / f"bucket-{i}", "ab") as file:
                piece.tofile(file)

    def drop_duplicates(self, rows: np.ndarray) -> np.ndarray:
        """Sort rows by hash and document; keep the first row of each hash and mark the others as duplicates."""
        rows = rows[np.lexsort((rows["document"], rows["low"], rows["high"]))]
        is_duplicate = np.zeros(len(rows), bool)
        is_duplicate[1:] = (rows["high"][1:] == rows["high"][:-1]) & (rows["low"][1:] == rows["low"][:-1])
        self.decisions[rows["document"][is_duplicate]] = DUPLICATE
        return rows[~is_duplicate]

    def __iter__(self) -> Iterator[np.ndarray]:
        if self.bits:
            self.flush()
        for i in range(2**self.bits):
            rows = (
                np.fromfile(self.directory / f"bucket-{i}", BUCKET_DTYPE) if self.bits else np.concatenate(self.buffer)
            )
            yield self.drop_duplicates(rows)


@dataclass
class Plan:
    """The decision on every document, and the position of every part in each split."""

    stems: list[str]  # of the parts, in source order
    decisions: np.ndarray  # (documents,) uint8
    first_document: np.ndarray  # (parts + 1,), each part's first document, then the number of documents
    first_token: dict[str, np.ndarray]  # split -> (parts + 1,), each part's first token, then the number of tokens
    documents: dict[str, int]  # decision -> documents
    filtered_by: dict[str, int]  # filter -> documents
    text_bytes: dict[str, int]  # split -> bytes of UTF-8
    split_rule: str = ""  # for dataset.json

    @property
    def tokens(self) -> dict[str, int]:
        return {split: int(first[-1]) for split, first in self.first_token.items()}

    def pieces(self, split: str, start: int, stop: int) -> list[Piece]:
        """Return the pieces of parts that contain tokens start ... stop - 1 of a split, in order.

        A piece is (stem, in_split, start, stop): tokens start ... stop - 1 of the documents of a part that `in_split`,
        (documents,) bool, selects.
        """
        first, pieces = self.first_token[split], []
        for i in range(int(np.searchsorted(first, start, "right")) - 1, int(np.searchsorted(first, stop, "left"))):
            in_split = self.decisions[self.first_document[i] : self.first_document[i + 1]] == SPLIT_DECISIONS[split]
            piece_start, piece_stop = max(start, int(first[i])), min(stop, int(first[i + 1]))
            if piece_start < piece_stop:
                pieces.append((self.stems[i], in_split, piece_start - int(first[i]), piece_stop - int(first[i])))
        return pieces

    def report(self) -> None:
        """Print the number of documents by decision, and how validation was chosen; UserError if no text is left."""
        if self.documents["kept"] == 0 and self.documents["filtered"]:
            raise UserError(
                "The source has no text that passes the filters. Lower the thresholds (--min-...), or set --encoding "
                "for files that cannot be decoded."
            )
        if self.documents["kept"] == 0:
            raise UserError(
                "The source has no text. Use a different source, or choose another column with --text-column."
            )
        if self.tokens["train"] == 0:
            raise UserError(
                "No training documents are left. Documents that are also validation documents are dropped, and "
                "--max-tokens counts both. Use more files or a larger --max-tokens."
            )
        if self.tokens["val"] == 0 and self.split_rule == NAMED:
            raise UserError("The files of --val-input have no text. Use other files.")
        print("documents: " + ", ".join(f"{count:,} {name}" for name, count in self.documents.items()))
        if self.tokens["val"]:
            share = self.tokens["val"] / sum(self.tokens.values())
            print(f"validation: {self.tokens['val']:,} tokens, {share:.1%} of all: {self.split_rule}")


def plan_shards(
    stems: list[str], val_tokens: int | None, max_tokens: int | None, scratch: Path, num_val_parts: int | None = None,
    tokenizer: Tokenizer | None = None,
) -> Plan:  # fmt: skip
    """Drop duplicates, apply `max_tokens`, choose validation documents, and place every document.

    The first of equal documents in source order is kept. The documents of the first `num_val_parts` parts are for
    validation. If it is None, those with the smallest hashes are, until they have `val_tokens` tokens (None: 5% of all,
    at most 11M). If these would have more than 2 * val_tokens tokens (None: more than 7% of all), or if all but one
    document are not enough, the last one is divided, and its end is for validation. Without a tokenizer, and below
    MIN_DIVIDED_TOKENS, documents are kept whole, and at least one of them remains for training.
    """
    decisions = [load_index(stem, ("decision",))["decision"] for stem in stems]
    first_document = np.cumsum([0, *map(len, decisions)])
    files.remove(scratch)  # a killed run may have left files
    scratch.mkdir(parents=True)
    buckets = Buckets(np.concatenate([np.empty(0, np.uint8), *decisions]), scratch)
    for stem, first in zip(stems, first_document.tolist(), strict=False):
        buckets.add(load_index(stem), first)
    for _ in buckets:
        pass  # the iteration marks the duplicates
    num_seen, num_kept, num_tokens = apply_max_tokens(stems, buckets.decisions, max_tokens or math.inf)
    kept, first_document = buckets.decisions[:num_seen], np.minimum(first_document, num_seen)
    if num_val_parts is not None:
        named = kept[: first_document[num_val_parts]]
        named[named == KEPT] = VALIDATION
        return place_documents(stems, kept, first_document, NAMED)
    limit = num_tokens * 7 // 100 if val_tokens is None else 2 * val_tokens
    val_tokens = min(DEFAULT_VAL_TOKENS, num_tokens // 20) if val_tokens is None else val_tokens
    excess = choose_validation(buckets, kept, num_kept, val_tokens, limit)
    rule = "whole documents: those with the smallest xxh3-128 hashes of their text"
    if excess is None or tokenizer is None:
        return place_documents(stems, kept, first_document, rule)
    document, num_val_tokens = excess
    part = int(np.searchsorted(first_document, document, "right")) - 1
    stem, at_line_end = divide_document(stems[part], document - int(first_document[part]), num_val_tokens, tokenizer)
    kept[document] = DIVIDED
    kept = np.append(kept, np.array([KEPT, VALIDATION], np.uint8))
    first_document = np.append(first_document, num_seen + 2)
    place = "at a line end" if at_line_end else "between two tokens"
    if num_kept == 1:
        rule = f"the end of the only document, divided {place}"
    else:
        rule = f"the end of one large document, divided {place}, and all documents with smaller xxh3-128 hashes"
    return place_documents([*stems, stem], kept, first_document, rule)


def apply_max_tokens(stems: list[str], decisions: np.ndarray, max_tokens: float) -> tuple[int, int, int]:
    """Return the number of documents, kept documents and kept tokens up to the document that reaches `max_tokens`."""
    num_seen = num_kept = num_tokens = 0
    for stem in stems:
        tokens = load_index(stem, ("tokens",))["tokens"]
        rows = np.flatnonzero(decisions[num_seen : num_seen + len(tokens)] == KEPT)
        totals = num_tokens + np.cumsum(tokens[rows], dtype=np.int64)
        if len(rows) and totals[-1] >= max_tokens:
            last = int(np.searchsorted(totals, max_tokens))
            return num_seen + int(rows[last]) + 1, num_kept + last + 1, int(totals[last])
        num_seen, num_kept = num_seen + len(tokens), num_kept + len(rows)
        num_tokens = int(totals[-1]) if len(rows) else num_tokens
    return num_seen, num_kept, num_tokens


def choose_validation(
    buckets: Buckets, decisions: np.ndarray, num_kept: int, val_tokens: int, limit: int
) -> tuple[int, int] | None:
    """Mark documents by smallest hash in `decisions`, until they have `val_tokens` tokens or all but one are marked.

    If the last one would bring the total above `limit`, or if all but one are not enough, and it can be divided, return
    it and the number of its tokens that are for validation; otherwise None.
    """
    num_left, missing = num_kept, val_tokens
    for rows in buckets:
        if missing <= 0:
            break
        rows = rows[rows["document"] < len(decisions)]
        rows = rows[decisions[rows["document"]] == KEPT]
        totals = np.cumsum(rows["tokens"], dtype=np.int64)
        num_needed = int(np.searchsorted(totals, missing)) + 1
        whole = rows[: min(num_needed, num_left - 1)]
        is_enough = len(whole) == num_needed
        if is_enough and val_tokens - missing + int(totals[num_needed - 1]) > limit:
            last, whole = whole[-1], whole[:-1]
        else:  # if all but one are not enough, the one that remains
            last = rows[len(whole)] if not is_enough and len(whole) == num_left - 1 < len(rows) else None
        if last is not None and last["tokens"] < MIN_DIVIDED_TOKENS:
            whole, last = rows[: min(num_needed, num_left - 1)], None
        decisions[whole["document"]] = VALIDATION
        num_left, missing = num_left - len(whole), missing - int(whole["tokens"].sum(dtype=np.int64))
        if last is not None:
            return int(last["document"]), min(missing, int(last["tokens"]) // 2)
    return None


def divide_document(stem: str, row: int, num_val_tokens: int, tokenizer: Tokenizer) -> tuple[str, bool]:
    """Write a part of two documents: the beginning and the end of document `row` of a part.

    The end has about `num_val_tokens` tokens, so that it begins after a line end. Returns the new part, and whether
    there was a line end nearby.
    """
    index, dtype = load_index(stem, ("tokens", "bytes")), token_dtype(tokenizer.vocab_size)
    start, length = (int(n) for n in (index["tokens"][:row].sum(dtype=np.int64), index["tokens"][row]))
    data = files.read_bytes(f"{stem}.bin", start * dtype.itemsize, (start + length) * dtype.itemsize)
    tokens = np.frombuffer(data, dtype)
    radius = min(20_000, num_val_tokens // 2)
    first = max(2, length - num_val_tokens - radius)  # the beginning has EOT and at least one token
    window = tokens[first - 1 : min(length - 1, length - num_val_tokens + radius)]
    ids = [token for token in np.unique(window).tolist() if tokenizer.decode([token]).endswith("\n")]
    cuts = first + np.flatnonzero(np.isin(window, ids))  # the tokens after those that end a line
    cut = int(cuts[np.argmin(np.abs(cuts - (length - num_val_tokens)))]) if len(cuts) else length - num_val_tokens
    end, new_stem = tokens[cut:], f"{os.path.dirname(stem)}/divided"
    end_bytes = int(tokenizer.token_bytes()[end].sum())
    files.write(f"{new_stem}.bin", data[: cut * dtype.itemsize] + tokens[:1].tobytes() + end.tobytes())
    with files.create(f"{new_stem}.npz") as file:
        np.savez(
            file, tokens=np.array([cut, 1 + len(end)], np.uint32),
            bytes=np.array([int(index["bytes"][row]) - end_bytes, end_bytes], np.uint64),
        )  # fmt: skip
    return new_stem, len(cuts) > 0


def place_documents(stems: list[str], decisions: np.ndarray, first_document: np.ndarray, split_rule: str) -> Plan:
    """Compute the position of each part in each split, and count documents by decision."""
    first_token = {split: np.zeros(len(stems) + 1, np.int64) for split in SPLIT_DECISIONS}
    text_bytes, counts = dict.fromkeys(SPLIT_DECISIONS, 0), np.zeros(256, np.int64)
    for i, stem in enumerate(stems):
        index = load_index(stem, ("tokens", "bytes"))
        part_decisions = decisions[first_document[i] : first_document[i + 1]]
        counts += np.bincount(part_decisions, minlength=256)
        for split, decision in SPLIT_DECISIONS.items():
            in_split = np.flatnonzero(part_decisions == decision)
            first_token[split][i + 1] = first_token[split][i] + index["tokens"][in_split].sum(dtype=np.int64)
            text_bytes[split] += int(index["bytes"][in_split].sum())
    filtered_by = {name: int(counts[decision]) for name, decision in FILTERED.items() if counts[decision]}
    documents = {
        "seen": len(decisions) - 2 * int(counts[DIVIDED]),  # without the two pieces of a document
        "kept": int(counts[KEPT] + counts[VALIDATION]), "empty": int(counts[EMPTY]),
        "filtered": sum(filtered_by.values()), "duplicate": int(counts[DUPLICATE]), "train": int(counts[KEPT]),
        "val": int(counts[VALIDATION]),
    }  # fmt: skip
    return Plan(stems, decisions, first_document, first_token, documents, filtered_by, text_bytes, split_rule)


def token_ranges(tokens: np.ndarray, in_split: np.ndarray, start: int, stop: int) -> tuple[np.ndarray, int]:
    """Return the token ranges of a piece in its part, from the length of each of the part's documents, `tokens`.

    The ranges, (ranges, 2) int64, are [start, stop), adjacent ones joined. Also returns the number of documents that
    start in the piece.
    """
    tokens = tokens[: len(in_split)].astype(np.int64)  # max_tokens may exclude the end of the part
    ends, tokens = np.cumsum(tokens)[in_split], tokens[in_split]  # ends of the documents in the part
    offsets = np.cumsum(tokens) - tokens  # starts of the documents among those in the split
    overlaps = (offsets + tokens > start) & (offsets < stop)
    starts = (ends - tokens + np.maximum(start - offsets, 0))[overlaps]
    ends = (ends - np.maximum(offsets + tokens - stop, 0))[overlaps]
    is_first = np.append(True, starts[1:] != ends[:-1])
    ranges = np.stack([starts[is_first], ends[np.append(np.flatnonzero(is_first)[1:], len(ends)) - 1]], axis=1)
    return ranges, int(np.count_nonzero((offsets >= start) & (offsets < stop)))
