"""Kill the preparation of datasets, and corrupt prepared datasets.

    python benchmarks/data_faults.py [--kills 200] [--damages 200] [--out results/data/faults.md]

Kills: the benchmark kills fineweb.py and its workers with SIGKILL at a random moment and starts it again until it
completes; then it starts the next dataset. The bytes must equal those of an uninterrupted run. Each run is forked from
this process, which has imported all modules, so that no kill falls into the startup of Python.
Corruptions: shards are truncated, extended, removed or rewritten, or a bit is flipped. The loader or `verify` must
reject the dataset with a message that names the file.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from datetime import date
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402

import fineweb  # noqa: E402
from babygpt.data import tasks, workers  # noqa: E402
from babygpt.data.shards import HEADER_BYTES, MANIFEST, open_dataset, verify  # noqa: E402
from babygpt.errors import UserError  # noqa: E402
from benchmarks.table import write_table  # noqa: E402


def write_inputs(directory: Path) -> int:
    """Write Parquet and JSONL files with 6,000 documents, some duplicate or empty; return how many are distinct."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=5)) for _ in range(2000)]
    texts = [" ".join(rng.choices(words, k=rng.randint(1, 300))) for _ in range(5000)]
    texts += rng.choices(texts, k=900) + [" "] * 100
    rng.shuffle(texts)
    for i in range(0, 4000, 500):
        pq.write_table(pa.table({"text": texts[i : i + 500]}), directory / f"{i:04d}.parquet", row_group_size=100)
    lines = (json.dumps({"text": text}) + "\n" for text in texts[4000:])
    (directory / "4000.jsonl").write_text("".join(lines))
    return len({text for text in texts if text.strip()})


def start(inputs: Path, directory: Path, num_workers: int) -> int:
    """Fork a run of fineweb.py in a new session and return its process id."""
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1), os.dup2(devnull, 2)
    arguments = ["files", "--input", str(inputs), "--out-dir", str(directory), "--workers", str(num_workers)]
    code = 1
    with (
        contextlib.suppress(BaseException),
        mock.patch.object(sys, "argv", ["fineweb.py", *arguments, "--shard-tokens", "100000"]),
        mock.patch.object(tasks, "TASK_BYTES", 100_000),
        mock.patch.object(workers, "_context", return_value=multiprocessing.get_context("fork")),
    ):
        fineweb.main()
        code = 0
    os._exit(code)


def read_files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir()) if path.is_file()}


def stage(directory: Path) -> str:
    """Return what a run of fineweb.py is doing, from the files in its output directory."""
    if (directory / MANIFEST).exists():
        return "when finished"
    if list(directory.glob("*.bin*")):
        return "while writing shards"
    return "while tokenizing" if list((directory / "parts").glob("*.npz")) else "at the start"


def run_kills(num_kills: int, num_workers: int, rng: random.Random) -> str:
    """Return a row of the table."""
    with tempfile.TemporaryDirectory() as temporary:
        inputs = Path(temporary) / "inputs"
        inputs.mkdir()
        num_documents = write_inputs(inputs)
        start_time = time.monotonic()
        os.waitpid(start(inputs, Path(temporary) / "uninterrupted" / "set", num_workers), 0)
        seconds = time.monotonic() - start_time
        expected = read_files(Path(temporary) / "uninterrupted" / "set")
        counts = json.loads(expected[MANIFEST])["counts"]["documents"]
        assert counts["kept"] == num_documents, counts
        killed, completed, different = 0, 0, 0
        kills_per_stage: Counter[str] = Counter()
        directory = Path(temporary) / "killed" / "set"
        while killed < num_kills or directory.exists():
            pid = start(inputs, directory, num_workers)
            if killed < num_kills:
                time.sleep(rng.uniform(0, 1.2 * seconds))
                killed_stage = stage(directory)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
            status = os.waitpid(pid, 0)[1]
            if os.WIFSIGNALED(status):
                killed += 1
                kills_per_stage[killed_stage] += 1
                continue
            completed += 1
            is_equal = read_files(directory) == expected and not (directory / "parts").exists()
            different += os.waitstatus_to_exitcode(status) != 0 or not is_equal
            shutil.rmtree(directory.parent)
        stages = ", ".join(f"{number} {name}" for name, number in kills_per_stage.items())
        outcome = f"{completed} completed datasets, {different} with different bytes"
        return f"| SIGKILL, workers: {num_workers} | {killed} ({stages}) | {outcome} |"


def error_message(directory: Path, run_verify: bool) -> str | None:
    """Return the error message of the loader (or of verify) for a dataset, or None if it is accepted."""
    try:
        open_dataset(directory)
        if run_verify:
            verify(directory)
    except UserError as error:
        return str(error)
    return None


def corrupt_datasets(times: int, rng: random.Random) -> list[str]:
    """Return the rows of the table."""
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        inputs, directory = Path(temporary) / "inputs", Path(temporary) / "set"
        inputs.mkdir()
        write_inputs(inputs)
        os.waitpid(start(inputs, directory, 1), 0)
        assert error_message(directory, run_verify=True) is None
        shards = sorted(directory.glob("*.bin"))

        def corrupt_shards(name: str, times: int, corrupt: Callable[[Path, bytes], None], run_verify: bool) -> None:
            rejected = 0
            for _ in range(times):
                shard = rng.choice(shards)
                data = shard.read_bytes()
                corrupt(shard, data)
                rejected += shard.name in (error_message(directory, run_verify) or "")
                shard.write_bytes(data)
            rows.append(f"| {name} | {times} | {rejected} rejected by {'verify' if run_verify else 'the loader'} |")

        def truncate(shard: Path, data: bytes) -> None:
            os.truncate(shard, rng.randrange(len(data)))

        def extend(shard: Path, data: bytes) -> None:
            shard.write_bytes(data + rng.randbytes(rng.randint(1, 5000)))

        def flip_bit(start: int, end: int | None) -> Callable[[Path, bytes], None]:
            def corrupt(shard: Path, data: bytes) -> None:
                offset = rng.randrange(start, end or len(data))
                shard.write_bytes(data[:offset] + bytes([data[offset] ^ 1 << rng.randrange(8)]) + data[offset + 1 :])

            return corrupt

        def change_dtype(shard: Path, data: bytes) -> None:
            tokens = np.frombuffer(data, "<u2", offset=HEADER_BYTES)
            header = np.zeros(256, "<i4")
            header[:3] = 20240801, 7, len(tokens)
            shard.write_bytes(header.tobytes() + tokens.astype("<u4").tobytes())

        corrupt_shards("truncated shard", times, truncate, run_verify=False)
        corrupt_shards("extended shard", times, extend, run_verify=False)
        corrupt_shards("bit flip in magic, version or token count", times // 2, flip_bit(0, 12), run_verify=False)
        corrupt_shards("bit flip in the rest of the header", times // 2, flip_bit(12, HEADER_BYTES), run_verify=True)
        corrupt_shards("bit flip in a token", times, flip_bit(HEADER_BYTES, None), run_verify=True)
        corrupt_shards("shard with another dtype", 10, change_dtype, run_verify=False)
        corrupt_shards("missing shard", 10, lambda shard, data: shard.unlink(), run_verify=False)
        other = Path(temporary) / "other"
        shutil.copytree(directory, other)
        manifest = json.loads((other / MANIFEST).read_text())
        manifest["tokenizer"]["sha256"] = "0" * 64
        (other / MANIFEST).write_text(json.dumps(manifest))
        rejected = int("gpt2" in (error_message(other, run_verify=True) or ""))
        rows.append(f"| wrong sha256 of the tokenizer | 1 | {rejected} rejected |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="number of kills per row (default: %(default)s)")
    parser.add_argument("--damages", type=int, default=200, help="corruptions per kind (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="Markdown file for the table")
    options = parser.parse_args()
    rng = random.Random(0)
    lines = [
        f"{date.today()}, {os.cpu_count()} cores, Python {platform.python_version()}", "",
        "A corrupted dataset counts as rejected if the message names the shard (for the tokenizer: its name).", "",
        "| fault | count | outcome |", "|---|---|---|",
    ]  # fmt: skip
    for num_workers in (1, 2):
        lines.append(run_kills(options.kills, num_workers, rng))
        print(lines[-1], file=sys.stderr)
    lines += corrupt_datasets(options.damages, rng)
    write_table(lines, options.out)


if __name__ == "__main__":
    main()
