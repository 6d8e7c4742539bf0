"""What becomes of a data set that is killed while it is made, or damaged afterwards.

    python benchmarks/data_faults.py [--kills 200] [--damages 200] [--out results/data/faults.md]

Kills: fineweb.py is ended by SIGKILL, workers and all, at a random moment, and started again, over and over until it
finishes; then the next one. The bytes must be those of a run that nobody killed. Every run is forked from this
process, which has imported everything, so that the moments fall into the work and not into Python's start.
Damages: shards are cut off, bytes of header or body flipped, shards lost or exchanged; the loader or `verify` must
refuse the data set and name the file.
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
from babygpt.data import readers, workers  # noqa: E402
from babygpt.data.shards import HEADER_BYTES, MANIFEST, open_dataset, verify  # noqa: E402
from babygpt.errors import UserError  # noqa: E402
from benchmarks.table import write_table  # noqa: E402


def write_pages(folder: Path) -> int:
    """Parquet and jsonl files with doubles and empty documents among 6,000; returns how many differ."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=5)) for _ in range(2000)]
    texts = [" ".join(rng.choices(words, k=rng.randint(1, 300))) for _ in range(5000)]
    texts += rng.choices(texts, k=900) + [" "] * 100
    rng.shuffle(texts)
    for i in range(0, 4000, 500):
        pq.write_table(pa.table({"text": texts[i : i + 500]}), folder / f"{i:04d}.parquet", row_group_size=100)
    lines = (json.dumps({"text": text}) + "\n" for text in texts[4000:])
    (folder / "4000.jsonl").write_text("".join(lines))
    return len({text for text in texts if text.strip()})


def start(pages: Path, folder: Path, count: int) -> int:
    """Forks a run of fineweb.py in a session of its own; returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1), os.dup2(quiet, 2)
    arguments = ["files", "--input", str(pages), "--out-dir", str(folder), "--workers", str(count)]
    code = 1
    with (
        contextlib.suppress(BaseException),
        mock.patch.object(sys, "argv", ["fineweb.py", *arguments, "--shard-tokens", "100000"]),
        mock.patch.object(readers, "TASK_BYTES", 100_000),
        mock.patch.object(workers, "_context", return_value=multiprocessing.get_context("fork")),
    ):
        fineweb.main()
        code = 0
    os._exit(code)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def kills(wanted: int, count: int, rng: random.Random) -> str:
    """A row of the table."""
    with tempfile.TemporaryDirectory() as place:
        pages = Path(place) / "pages"
        pages.mkdir()
        documents = write_pages(pages)
        begin = time.monotonic()
        os.waitpid(start(pages, Path(place) / "calm" / "set", count), 0)
        seconds = time.monotonic() - begin
        calm = contents(Path(place) / "calm" / "set")
        counts = json.loads(calm[MANIFEST])["counts"]["documents"]
        assert counts["kept"] == documents, counts
        killed, finished, wrong = 0, 0, 0
        found: Counter[str] = Counter()
        folder = Path(place) / "killed" / "set"
        while killed < wanted or folder.exists():
            pid = start(pages, folder, count)
            if killed < wanted:
                time.sleep(rng.uniform(0, 1.2 * seconds))
                parts = folder / "parts"
                state = "finished" if (folder / MANIFEST).exists() else "writing" if list(folder.glob("*.bin*")) else (
                    "tokenizing" if list(parts.glob("*.npz")) else "beginning")  # fmt: skip
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
            status = os.waitpid(pid, 0)[1]
            if os.WIFSIGNALED(status):
                killed += 1
                found[state] += 1
                continue
            finished += 1
            wrong += os.waitstatus_to_exitcode(status) != 0 or contents(folder) != calm or (folder / "parts").exists()
            shutil.rmtree(folder.parent)
        where = ", ".join(f"{number} while {state}" for state, number in found.items())
        return f"| SIGKILL, {count} workers | {killed} ({where}) | {finished} finished runs, {wrong} with other bytes |"


def refusal(folder: Path, deep: bool) -> str | None:
    """What the loader (or verify) says of a data set; None where it takes it."""
    try:
        open_dataset(folder)
        if deep:
            verify(folder)
    except UserError as error:
        return str(error)
    return None


def damages(wanted: int, rng: random.Random) -> list[str]:
    """Rows of the table."""
    rows = []
    with tempfile.TemporaryDirectory() as place:
        pages, folder = Path(place) / "pages", Path(place) / "set"
        pages.mkdir()
        write_pages(pages)
        os.waitpid(start(pages, folder, 1), 0)
        assert refusal(folder, deep=True) is None
        shards = sorted(folder.glob("*.bin"))

        def try_out(what: str, times: int, damage: Callable[[Path, bytes], None], deep: bool) -> None:
            named = 0
            for _ in range(times):
                shard = rng.choice(shards)
                sound = shard.read_bytes()
                damage(shard, sound)
                named += shard.name in (refusal(folder, deep) or "")
                shard.write_bytes(sound)
            rows.append(f"| {what} | {times} | {named} refused by name, by {'verify' if deep else 'the loader'} |")

        def cut(shard: Path, sound: bytes) -> None:
            os.truncate(shard, rng.randrange(len(sound)))

        def longer(shard: Path, sound: bytes) -> None:
            shard.write_bytes(sound + rng.randbytes(rng.randint(1, 5000)))

        def flip(first: int, last: int | None) -> Callable[[Path, bytes], None]:
            def damage(shard: Path, sound: bytes) -> None:
                at = rng.randrange(first, last or len(sound))
                shard.write_bytes(sound[:at] + bytes([sound[at] ^ 1 << rng.randrange(8)]) + sound[at + 1 :])

            return damage

        def other_dtype(shard: Path, sound: bytes) -> None:
            tokens = np.frombuffer(sound, "<u2", offset=HEADER_BYTES)
            header = np.zeros(256, "<i4")
            header[:3] = 20240801, 7, len(tokens)
            shard.write_bytes(header.tobytes() + tokens.astype("<u4").tobytes())

        try_out("shard cut off", wanted, cut, deep=False)
        try_out("shard too long", wanted, longer, deep=False)
        try_out("bit of magic, version or count flipped", wanted // 2, flip(0, 12), deep=False)
        try_out("bit of the header's rest flipped", wanted // 2, flip(12, HEADER_BYTES), deep=True)
        try_out("bit of a token flipped", wanted, flip(HEADER_BYTES, None), deep=True)
        try_out("shard of another dtype", 10, other_dtype, deep=False)
        try_out("shard missing", 10, lambda shard, sound: shard.unlink(), deep=False)
        other = Path(place) / "other"
        shutil.copytree(folder, other)
        manifest = json.loads((other / MANIFEST).read_text())
        manifest["tokenizer"]["sha256"] = "0" * 64
        (other / MANIFEST).write_text(json.dumps(manifest))
        rows.append(
            f"| tokenizer's file exchanged | 1 | {int('gpt2' in (refusal(other, True) or ''))} refused by name |"
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--damages", type=int, default=200)
    parser.add_argument("--out", type=Path, help="a Markdown file for the table")
    options = parser.parse_args()
    rng = random.Random(0)
    lines = [
        f"{date.today()}, {os.cpu_count()} cores, Python {platform.python_version()}", "",
        "| fault | times | what became of it |", "|---|---|---|",
    ]  # fmt: skip
    for count in (1, 2):
        lines.append(kills(options.kills, count, rng))
        print(lines[-1], file=sys.stderr)
    lines += damages(options.damages, rng)
    write_table(lines, options.out)


if __name__ == "__main__":
    main()
