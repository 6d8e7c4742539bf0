"""plan.py: the plan of a dataset equals that of a simple implementation, one document and one token at a time."""

import itertools
import random
import resource
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
from support.preparation import hash_text

from babygpt.data import plan as plan_module
from babygpt.data.filters import EMPTY, KEPT
from babygpt.data.plan import load_index, plan_shards, token_ranges


def write_index(stem: Path, rows: list[tuple[str, int]]) -> str:
    """Write the index of a part with these documents (text, number of tokens); an empty document has 0 tokens."""
    np.savez(
        f"{stem}.npz",
        hash=np.frombuffer(b"".join(hash_text(text) for text, _ in rows), ">u8").reshape(-1, 2),
        tokens=np.array([tokens for _, tokens in rows], np.uint32),
        bytes=np.array([len(text) for text, _ in rows], np.uint64),
        decision=np.array([KEPT if tokens else EMPTY for _, tokens in rows], np.uint8),
    )
    return str(stem)


def simple_plan(parts, val_tokens, max_tokens):
    """Return the documents of each split, each a list with (part, position in the part) per token, and their counts."""
    counts, kept, total = Counter(seen=0, kept=0, empty=0, duplicate=0, filtered=0, train=0, val=0), {}, 0
    for part, rows in enumerate(parts):
        for row, (text, tokens) in enumerate(rows):
            if max_tokens is not None and total >= max_tokens:
                break
            start = sum(tokens for _, tokens in rows[:row])
            decision = "empty" if not tokens else "duplicate" if text in kept else "kept"
            counts[decision] += 1
            counts["seen"] += 1
            if decision == "kept":
                kept[text] = [(part, start + i) for i in range(tokens)]
                total += tokens
    val_size, val_texts = min(11_000_000, total // 20) if val_tokens is None else val_tokens, set()
    for text in sorted(kept, key=hash_text):
        if sum(len(kept[name]) for name in val_texts) < val_size and len(val_texts) < len(kept) - 1:
            val_texts.add(text)
    splits = {"train": [], "val": []}
    for text, positions in kept.items():
        counts["val" if text in val_texts else "train"] += 1
        splits["val" if text in val_texts else "train"].append(positions)
    return splits, counts


def test_plan_and_token_ranges_equal_a_simple_implementation(tmp_path):
    rng = random.Random(0)
    for case in range(150):
        lengths = {f"{case} {i}": rng.choice([0, 1, 1, 2, 5, 30]) for i in range(rng.choice([1, 3, 15, 40]))}
        parts = [rng.choices(list(lengths.items()), k=rng.randint(0, 12)) for _ in range(rng.randint(1, 5))]
        max_total = sum(lengths.values())
        val_tokens, max_tokens = (rng.choice([None, 0, 1, rng.randint(1, max_total + 1)]) for _ in "vm")
        stems = [write_index(tmp_path / str(i), rows) for i, rows in enumerate(parts)]
        with mock.patch.object(plan_module, "BUCKET_ROWS", rng.choice([2, 5, 1000])):  # several buckets, or one
            plan = plan_shards(stems, val_tokens, max_tokens or None, tmp_path / "buckets")
        splits, counts = simple_plan(parts, val_tokens, max_tokens or None)
        positions = {split: list(itertools.chain(*documents)) for split, documents in splits.items()}
        assert plan.documents == counts
        starts = {split: {document[0] for document in documents} for split, documents in splits.items()}
        for split in ("train", "val"):
            assert plan.tokens[split] == len(positions[split])
            shard_size = rng.randint(1, 20)
            for begin in range(0, len(positions[split]), shard_size):
                end = min(begin + shard_size, len(positions[split]))
                planned, starting = [], 0
                for stem, in_split, first, last in plan.pieces(split, begin, end):
                    ranges, count = token_ranges(load_index(stem)["tokens"], in_split, first, last)
                    planned += [(stems.index(stem), i) for a, b in ranges.tolist() for i in range(a, b)]
                    starting += count
                    assert (ranges[1:, 0] > ranges[:-1, 1]).all()  # adjacent ranges are merged
                assert planned == positions[split][begin:end]
                assert starting == sum(position in starts[split] for position in positions[split][begin:end])


def test_plan_does_not_keep_the_index_files_open(tmp_path):
    stems = [write_index(tmp_path / str(i), [(str(i), 3)]) for i in range(200)]
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, limits[1]))
    try:
        assert plan_shards(stems, 0, None, tmp_path / "buckets").documents["train"] == 200
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_validation_is_11_m_tokens_or_5_percent_if_less(tmp_path):
    for count, val_count in ((400, 11), (100, 5)):
        stem = write_index(tmp_path / "part", [(str(i), 1_000_000) for i in range(count)])
        assert plan_shards([stem], None, None, tmp_path / "buckets").documents["val"] == val_count
