"""What more than one test file uses."""

import gzip
import json
import lzma
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa

from babygpt.data.shards import Tokens

EOT = 0  # end of text in `make_tokens`


def call(main: Callable[[], None], *arguments) -> None:
    """Runs a script's `main()` in this process, with these arguments on its command line."""
    with mock.patch.object(sys, "argv", ["script.py", *map(str, arguments)]):
        main()


def save(path: Path, data: bytes) -> Path:
    """Writes a file, compressed as its ending says."""
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
    """Questions in HellaSwag's format."""
    rows = [
        {
            "ind": i, "activity_label": "Reading data", "ctx_a": f"the model reads {i} tokens.", "ctx_b": "it",
            "ctx": f"the model reads {i} tokens. it", "label": i % 4, "source_id": "activitynet~x",
            "endings": [f"writes a {word} shard" + " of data" * (i % 3) for word in ("small", "large", "new", "old")],
        }
        for i in range(count)
    ]  # fmt: skip
    return save(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def make_tokens(num_tokens: int, mean_document: float, rng: np.random.Generator, num_shards: int = 3) -> Tokens:
    """Documents of random length behind EOTs, in shards of unequal size; text ids count up, so none repeats."""
    ids = np.arange(1, num_tokens + 1, dtype=np.uint32)
    ids[0] = EOT
    ids[1:][rng.random(num_tokens - 1) < 1 / mean_document] = EOT
    borders = np.sort(rng.integers(0, num_tokens + 1, num_shards - 1))
    return Tokens(np.split(ids, borders))
