"""The plan of a data set: which documents stay, in which split, and where. Pure functions of the map's indexes.

An index (`parts/N.npz`) has a row a document: blake2b-128 of its text as two uint64, tokens with EOT, bytes of
UTF-8, and what becomes of it.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

KEPT, EMPTY, DUPLICATE = 0, 1, 2  # what becomes of a document; only the plan knows the duplicates
DEFAULT_VAL_TOKENS = 11_000_000  # the validation of a run reads the first 20 x 524,288


def load_index(stem: Path) -> dict[str, np.ndarray]:
    """The index of a part: `hash` (n, 2), `tokens`, `bytes` and `decision` (n,)."""
    with np.load(f"{stem}.npz") as file:
        return {name: file[name] for name in ("hash", "tokens", "bytes", "decision")}


@dataclass
class Plan:
    """Where every kept document goes. `runs[split]` is (n, 4) int64: part, first and last-plus-one token in the
    part, first token in the split; documents that follow each other in both are one run."""

    runs: dict[str, np.ndarray]
    starts: dict[str, np.ndarray]  # of the documents in the split, (documents,) int64
    tokens: dict[str, int]
    documents: dict[str, int]
    bytes: dict[str, int]


def plan(stems: list[Path], val_tokens: int | None, max_tokens: int | None) -> Plan:
    """The first of equal documents stays; source order up to max_tokens; the smallest hashes validate."""
    indexes = list(map(load_index, stems))
    part = np.repeat(np.arange(len(stems)), [len(index["tokens"]) for index in indexes])
    hashes = np.concatenate([index["hash"] for index in indexes])
    tokens = np.concatenate([index["tokens"] for index in indexes]).astype(np.int64)
    sizes = np.concatenate([index["bytes"] for index in indexes]).astype(np.int64)
    decision = np.concatenate([index["decision"] for index in indexes])
    offset = np.concatenate([np.cumsum(index["tokens"], dtype=np.int64) - index["tokens"] for index in indexes])

    kept = np.flatnonzero(decision == KEPT)
    by_hash = kept[np.lexsort((kept, hashes[kept, 1], hashes[kept, 0]))]
    again = np.flatnonzero((hashes[by_hash[1:]] == hashes[by_hash[:-1]]).all(axis=1)) + 1
    decision[by_hash[again]] = DUPLICATE
    kept = np.flatnonzero(decision == KEPT)
    seen = len(decision)
    if max_tokens is not None and tokens[kept].sum() >= max_tokens:
        kept = kept[: int(np.searchsorted(np.cumsum(tokens[kept]), max_tokens)) + 1]
        seen = int(kept[-1]) + 1

    total = int(tokens[kept].sum())
    wanted = min(DEFAULT_VAL_TOKENS, total // 20) if val_tokens is None else val_tokens
    by_hash = kept[np.lexsort((hashes[kept, 1], hashes[kept, 0]))]
    num_val = int(np.searchsorted(np.cumsum(tokens[by_hash]), wanted)) + 1 if wanted > 0 else 0
    val = np.sort(by_hash[: min(num_val, len(kept) - 1)])
    split = {"val": val, "train": np.setdiff1d(kept, val, assume_unique=True)}

    runs, starts = {}, {}
    for name, documents in split.items():
        starts[name] = np.cumsum(tokens[documents]) - tokens[documents]
        begin, end = offset[documents], offset[documents] + tokens[documents]
        fresh = np.ones(len(documents), bool)  # where a document doesn't follow its predecessor in the part
        fresh[1:] = (part[documents[1:]] != part[documents[:-1]]) | (begin[1:] != end[:-1])
        first = np.flatnonzero(fresh)
        last = np.append(first[1:], len(documents)) - 1 if len(first) else first
        runs[name] = np.stack([part[documents[first]], begin[first], end[last], starts[name][first]], axis=1)
    counts = {"seen": seen, "kept": len(kept)}
    counts |= {"empty": int((decision[:seen] == EMPTY).sum()), "duplicate": int((decision[:seen] == DUPLICATE).sum())}
    counts |= {"filtered": 0, "train": len(split["train"]), "val": len(split["val"])}
    return Plan(
        runs, starts,
        {name: int(tokens[documents].sum()) for name, documents in split.items()},
        counts,
        {name: int(sizes[documents].sum()) for name, documents in split.items()},
    )  # fmt: skip


def shard_ranges(runs: np.ndarray, begin: int, end: int) -> list[tuple[int, int, int]]:
    """(part, first, last-plus-one token in it) of the split's tokens begin ... end - 1."""
    stops = runs[:, 3] + runs[:, 2] - runs[:, 1]
    touched = runs[(stops > begin) & (runs[:, 3] < end)]
    ranges = []
    for part, first, last, at in touched.tolist():
        ranges.append((part, first + max(0, begin - at), last - max(0, at + last - first - end)))
    return ranges
