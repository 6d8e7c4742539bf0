"""Helpers that several test files share: run a script, write input files, generate token data."""

import gzip
import json
import lzma
import random
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa

from babygpt.data.shards import Tokens

EOT = 0  # the EOT id of `make_tokens`


def call(main: Callable[[], None], *arguments) -> None:
    """Run the `main()` of a script in this process, with `arguments` as its command line."""
    with mock.patch.object(sys, "argv", ["script.py", *map(str, arguments)]):
        main()


def save(path: Path, data: bytes) -> Path:
    """Write a file, compressed according to its suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".zst":
        file = pa.output_stream(str(path), compression="zstd")
    else:
        file = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)(path, "wb")
    with file:
        file.write(data)
    return path


def save_jsonl(path: Path, texts: Iterable[str], ascii: bool = True) -> Path:
    lines = (json.dumps({"text": text}, ensure_ascii=ascii) + "\n" for text in texts)
    return save(path, "".join(lines).encode("utf-8"))


def save_hellaswag(path: Path, count: int) -> Path:
    """Write `count` questions in the format of HellaSwag."""
    rows = [
        {
            "ind": i, "activity_label": "Reading data", "ctx_a": f"the model reads {i} tokens.", "ctx_b": "it",
            "ctx": f"the model reads {i} tokens. it", "label": i % 4, "source_id": "activitynet~x",
            "endings": [f"writes a {word} shard" + " of data" * (i % 3) for word in ("small", "large", "new", "old")],
        }
        for i in range(count)
    ]  # fmt: skip
    return save(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def make_tokens(num_tokens: int, mean_length: float, rng: np.random.Generator, num_shards: int = 3) -> Tokens:
    """Return documents of random length, each after an EOT, in shards of unequal size. No text id occurs twice."""
    ids = np.arange(1, num_tokens + 1, dtype=np.uint32)
    ids[0] = EOT
    ids[1:][rng.random(num_tokens - 1) < 1 / mean_length] = EOT
    boundaries = np.sort(rng.integers(0, num_tokens + 1, num_shards - 1))
    return Tokens(np.split(ids, boundaries))


def random_text(seed: int) -> str:
    """Return a text of words, numbers, punctuation, whitespace and characters of many scripts."""
    rng, pieces = random.Random(seed), []
    ascii_pieces = ("the", "The", "don't", "we'll", "2026", "3.14", "...", "--", "_x", "def f(x):")
    spaces = ("\n", "\n\n", "  ", "\t", " ", "\r\n", "\u00a0", "\u3000")
    others = ("za\u017c\u00f3\u0142\u0107", "\u4f60\u597d", "\U0001f642", "\u0645\u0631\u062d", "e\u0301")
    for _ in range(rng.randint(0, 60)):
        pieces.append(rng.choice([*ascii_pieces, *spaces, *others, chr(rng.randint(1, 0x2FFF))]))
        pieces.append(" " * rng.randint(0, 1))
    return "".join(pieces)
