"""Malformed input by the thousand: every kind is made from something sound, and only a UserError may come of it.

python tests/fuzzing.py 10000            # prints a table; tests/test_faults.py runs a few hundred
"""

import contextlib
import io
import json
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from helpers import call, save_hellaswag, save_jsonl

import checkpoint
import fineweb
import tokenizer
from errors import UserError
from hellaswag import load_examples
from log import COLUMNS, Log, read_log
from model import GPT, GPTConfig
from shards import open_dataset, verify
from sources import documents, find
from tokenizer import load_tokenizer
from train_config import PRESETS, parse, resolve, to_json

ODD = (
    None, True, False, 0, -1, 1, 3, 2**31, 2**63, 10**30, -0.5, 1e308, float("inf"), float("nan"), "", " ", "0", "-1",
    "x", "nan", "1e400", "\x00", "\ud800", "\u2028", "../..", "/", "a" * 5000, [], [0], ["x"], {}, {"x": 0}, [[[]]],
)  # fmt: skip


def odd_value(rng: random.Random) -> object:
    return rng.choice(ODD)


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Some bytes changed, cut off, doubled or put in."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(6)
        if kind == 0 and data:
            data[at % len(data)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            data[at:at] = rng.randbytes(rng.choice((1, 7, 300)))
        elif kind == 3:
            data[at:at] = data[at : at + rng.randrange(1, 200)]
        elif kind == 4:
            del data[at : at + rng.randrange(1, 200)]
        else:
            data[at:at] = rng.choice((b"\x00", b"\n", b"\r\n", b"\xff\xfe", b'"', b",", b"{}", b"[", b"\xe2\x80\xa8"))
    return bytes(data)


def places(value: object, path: tuple = ()) -> list[tuple]:
    """The paths of all values in nested dicts and lists."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += places(inner, (*path, key))
    return found


def odd_json(text: str, rng: random.Random) -> str:
    """One value of a JSON text replaced by an odd one, left out, or put under another name."""
    value = json.loads(text)
    path = rng.choice(places(value))
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    kind = rng.randrange(4)
    if kind == 0:
        del inner[path[-1]]
    elif kind == 1 and isinstance(inner, dict):
        inner["unknown"] = inner.pop(path[-1])
    else:
        inner[path[-1]] = odd_value(rng)
    return json.dumps(value)


def small_dataset(folder: Path) -> Path:
    """A sound data set of a few documents, as fineweb.py makes it."""
    rng = random.Random(0)
    texts = [
        " ".join(rng.choices(["the", "a", "of", "and", "model", "data", "token", "loss", "step"], k=30))
        for _ in range(30)
    ]
    tokenizer.train(texts, 280, folder / "bpe.json", progress=False)
    save_jsonl(folder / "texts.jsonl", texts)
    call(
        fineweb.main, "files", "--input", folder / "texts.jsonl", "--tokenizer", folder / "bpe.json",
        "--out-dir", folder / "tiny", "--val-tokens", 300, "--workers", 1,
    )  # fmt: skip
    return folder / "tiny"


# ---------------------------------------------------------------------------------------------------------
# kinds: each makes something malformed in a folder of its own, and reads it


class Kinds:
    def __init__(self, dataset: Path, folder: Path):
        """`dataset` is a sound one, small; `folder` is for what is made."""
        self.dataset, self.folder = dataset, folder
        self.tokenizer = load_tokenizer(dataset)
        self.questions = save_hellaswag(folder / "sound.jsonl", 5).read_text()
        model = GPT(GPTConfig(block_size=8, vocab_size=50, n_layer=1, n_head=2, n_embd=8))
        state = {
            "step": 3, "tokens": 768, "position": {"epoch": 0, "n": 3}, "losses": [3.0, 2.5],
            "model": vars(model.config), "tokenizer": {"name": "gpt2", "sha256": ""},
        }  # fmt: skip
        optimizer = {name: {"exp_avg": p.detach()} for name, p in model.named_parameters()}
        self.checkpoint = checkpoint.save(folder / "sound", 3, checkpoint.model_tensors(model), optimizer, state, 0)
        log = Log(folder / "sound.csv")
        for step in range(6):
            log.write({"step": step, "tokens": step * 10, "epoch": 0, "loss": 3.0 / (step + 1), "lr": 1e-3})
        log.close()
        self.log = (folder / "sound.csv").read_bytes()

    def all(self) -> dict[str, Callable[[random.Random], None]]:
        return {name: getattr(self, name) for name in dir(self) if name.startswith("a_")}

    def copy(self, source: Path) -> Path:
        target = self.folder / "made"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target)
        return target

    def a_command_line(self, rng: random.Random) -> None:
        config = to_json(PRESETS["demo"])
        section = rng.choice(list(config))
        name = rng.choice(list(config[section]))
        value = odd_value(rng)
        words = [str(v) for v in value] if isinstance(value, list) else [str(value)]
        line = ["demo", f"--{section}.{name.replace('_', '-')}", *words]
        if section != "data" or name != "dataset":
            line += ["--data.dataset", str(self.dataset)]
        try:
            resolve(parse(line)[1], rng.choice((1, 2, 8)))
        except SystemExit as end:  # tyro's own message
            if end.code != 2:
                raise

    def a_hellaswag_file(self, rng: random.Random) -> None:
        lines = self.questions.splitlines()
        at = rng.randrange(len(lines))
        kind = rng.randrange(2)
        data = "\n".join([*lines[:at], odd_json(lines[at], rng), *lines[at + 1 :]]).encode("utf-8", "surrogatepass")
        path = self.folder / "questions.jsonl"
        path.write_bytes(data if kind else damaged(self.questions.encode(), rng))
        load_examples(path, self.tokenizer, rng.choice(("karpathy", "lm-eval")))

    def a_data_set(self, rng: random.Random) -> None:
        folder = self.copy(self.dataset)
        path = rng.choice([path for path in folder.iterdir() if path.is_file()])
        if path.suffix == ".json" and rng.random() < 0.8:
            path.write_text(odd_json(path.read_text(), rng))
        else:
            path.write_bytes(damaged(path.read_bytes(), rng))
        found = open_dataset(folder)
        load_tokenizer(found.tokenizer)
        if rng.random() < 0.3:
            verify(folder)

    def a_checkpoint(self, rng: random.Random) -> None:
        """Half of them by someone who makes the manifest fit."""
        folder = self.copy(self.checkpoint)
        path = rng.choice([path for path in folder.iterdir() if path.name != "manifest.json" or rng.random() < 0.3])
        if path.suffix == ".json" and rng.random() < 0.7:
            path.write_text(odd_json(path.read_text(), rng))
        else:
            path.write_bytes(damaged(path.read_bytes(), rng))
        if rng.random() < 0.5 and path.name != "manifest.json":
            files = {
                name: checkpoint._sha256(folder / name) for name in ("model.safetensors", "optimizer.pt", "state.json")
            }
            (folder / "manifest.json").write_text(json.dumps({"files": files}))
        checkpoint.load(folder)
        checkpoint.load_model(folder, torch.device("cpu"))

    def a_log(self, rng: random.Random) -> None:
        path = self.folder / "log.csv"
        path.write_bytes(damaged(self.log, rng))
        assert all(row.keys() == set(COLUMNS) for row in read_log(path))

    def a_corpus(self, rng: random.Random) -> None:
        name = rng.choice(("corpus.jsonl", "corpus.jsonl.gz", "corpus.jsonl.zst", "corpus.txt", "corpus.parquet"))
        path = self.folder / name
        texts = ["A text.", "Another\u2028one.", "", "\x00\ufeff", "x" * 10_000]
        if name.endswith(".parquet"):
            pq.write_table(pa.table({"text": texts}), path)
        else:
            save_jsonl(path, texts)
        path.write_bytes(damaged(path.read_bytes(), rng))
        for _ in documents(find("files", (str(path),))):
            pass


def fuzz(kinds: Kinds, count: int, seed: int = 0) -> tuple[dict[str, Counter], list[str]]:
    """`count` malformed inputs over all kinds: how many were refused and how many taken, by kind; and what else."""
    found, wrong = {name: Counter() for name in kinds.all()}, []
    for i in range(count):
        name = list(found)[i % len(found)]
        rng = random.Random(f"{seed} {i}")
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                kinds.all()[name](rng)
            found[name]["taken"] += 1
        except UserError as error:
            found[name]["refused"] += 1
            if not str(error).strip():
                wrong.append(f"{name}, {i}: a message without words")
        except Exception as error:
            found[name]["wrong"] += 1
            wrong.append(f"{name}, {i}: {error!r}"[:300])
    return found, wrong


def main() -> None:
    count = int(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        found, wrong = fuzz(Kinds(small_dataset(Path(folder)), Path(folder)), count)
    print("| malformed | refused in a sentence | harmless | else |\n|---|---:|---:|---:|")
    for name, counts in found.items():
        print(f"| {name[2:].replace('_', ' ')} | {counts['refused']:,} | {counts['taken']:,} | {counts['wrong']:,} |")
    print(*wrong, sep="\n")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
