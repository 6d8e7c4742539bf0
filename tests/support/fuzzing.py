"""Malformed input, made by corrupting valid input. Reading it must succeed or raise a UserError.

python tests/support/fuzzing.py 10000    # prints a table; tests/faults/test_faults.py runs a few hundred inputs
"""

import contextlib
import dataclasses
import io
import itertools
import json
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_args

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))

import pyarrow as pa
import pyarrow.parquet as pq

import train
from arguments import parse, resolve
from babygpt.data.shards import open_dataset, verify
from babygpt.data.sources import find, read_documents
from babygpt.data.tokenizer import load_tokenizer
from babygpt.errors import UserError
from babygpt.training import checkpoint
from babygpt.training.log import COLUMNS, Log, read_log
from hellaswag import load_examples
from model import GPT, GPTConfig
from support.helpers import call, save_hellaswag, save_jsonl
from support.runs import flags, make_tiny_dataset
from train_config import Config, preset

UNUSUAL_VALUES = (
    None, True, False, 0, -1, 1, 3, 2**31, 2**63, 10**30, -0.5, 1e308, float("inf"), float("nan"), "", " ", "0", "-1",
    "x", "nan", "1e400", "\x00", "\ud800", "\u2028", "../..", "/", "a" * 5000, [], [0], ["x"], {}, {"x": 0}, [[[]]],
)  # fmt: skip


def unusual_value(rng: random.Random) -> object:
    return rng.choice(UNUSUAL_VALUES)


def corrupt(data: bytes, rng: random.Random) -> bytes:
    """Return a copy of the data with some bytes changed, removed, repeated or inserted."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        offset = rng.randrange(len(data) + 1)
        kind = rng.randrange(6)
        if kind == 0 and data:
            data[offset % len(data)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[offset:]
        elif kind == 2:
            data[offset:offset] = rng.randbytes(rng.choice((1, 7, 300)))
        elif kind == 3:
            data[offset:offset] = data[offset : offset + rng.randrange(1, 200)]
        elif kind == 4:
            del data[offset : offset + rng.randrange(1, 200)]
        else:
            inserted = rng.choice((b"\x00", b"\n", b"\r\n", b"\xff\xfe", b'"', b",", b"{}", b"[", b"\xe2\x80\xa8"))
            data[offset:offset] = inserted
    return bytes(data)


def value_paths(value: object, path: tuple = ()) -> list[tuple]:
    """Return the paths of all values in nested dictionaries and lists."""
    paths = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        paths += value_paths(inner, (*path, key))
    return paths


def corrupt_json(text: str, rng: random.Random) -> str:
    """Replace one value of a JSON text by an unusual one, remove it, or rename its key."""
    value = json.loads(text)
    path = rng.choice(value_paths(value))
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    kind = rng.randrange(4)
    if kind == 0:
        del inner[path[-1]]
    elif kind == 1 and isinstance(inner, dict):
        inner["unknown"] = inner.pop(path[-1])
    else:
        inner[path[-1]] = unusual_value(rng)
    return json.dumps(value)


# large values of these fields are valid, but the run would take too long
SIZE_FIELDS = {
    "max_steps", "n_layer", "n_head", "n_embd", "max_new_tokens", "num_samples", "window", "block_size", "vocab_size",
    "value_embeddings", "bigram_tables",
}  # fmt: skip


def changed_settings() -> Iterator[list[str]]:
    """Yield arguments that change one field: each field to each unusual value and to each choice of its type."""
    for section in dataclasses.fields(Config):
        for field in dataclasses.fields(getattr(preset("modern"), section.name)):
            flag = f"--{section.name}.{field.name.replace('_', '-')}"
            if field.type is bool:
                yield [flag]
                yield [f"--{section.name}.no-{field.name.replace('_', '-')}"]
            for choice in get_args(field.type):
                if isinstance(choice, str) and (field.name, choice) != ("compile", "on"):  # compilation takes minutes
                    yield [flag, choice]
            for value in UNUSUAL_VALUES:
                too_large = field.name in SIZE_FIELDS and isinstance(value, int | float) and value > 1000
                if not too_large and (field.name, value) not in (("out_dir", "/"), ("out_dir", "../..")):
                    yield [flag, *(map(str, value) if isinstance(value, list) else [str(value)])]


def raise_user_error(error: SystemExit) -> None:
    """Raise a UserError in place of the exit of tyro, which has printed a message; raise other exits again."""
    if error.code == 2:
        raise UserError("an error message of tyro") from None
    raise error


def make_small_dataset(directory: Path) -> Path:
    """Prepare a valid dataset of a few documents."""
    rng = random.Random(0)
    texts = [
        " ".join(rng.choices(["the", "a", "of", "and", "model", "data", "token", "loss", "step"], k=30))
        for _ in range(30)
    ]
    return make_tiny_dataset(texts, directory, 280)


# ---------------------------------------------------------------------------------------------------------
# kinds of malformed input


class MalformedInputs:
    """Each method `fuzz_KIND` writes a malformed input into a directory and reads it."""

    def __init__(self, dataset: Path, directory: Path):
        """`dataset` is the directory of a small, valid dataset. The inputs are written into `directory`."""
        self.dataset, self.directory = dataset, directory
        self.tokenizer = load_tokenizer(dataset)
        self.questions = save_hellaswag(directory / "valid.jsonl", 5).read_text()
        model = GPT(GPTConfig(block_size=8, vocab_size=50, n_layer=1, n_head=2, n_embd=8))
        state = {
            "step": 3, "tokens": 768, "position": {"epoch": 0, "n": 3}, "losses": [3.0, 2.5],
            "model": vars(model.config), "tokenizer": {"name": "gpt2", "sha256": ""},
        }  # fmt: skip
        optimizer = {name: {"exp_avg": p.detach()} for name, p in model.named_parameters()}
        self.checkpoint = checkpoint.save(directory / "valid", 3, checkpoint.model_tensors(model), optimizer, state, 0)
        log = Log(directory / "valid.csv")
        for step in range(6):
            log.write({"step": step, "tokens": step * 10, "epoch": 0, "loss": 3.0 / (step + 1), "lr": 1e-3})
        log.close()
        self.log = (directory / "valid.csv").read_bytes()
        self.run_settings = {
            "training__max_steps": 2, "model__n_layer": 1, "evaluation__every_n_steps": 2, "sampling__every_n_steps": 2,
            "evaluation__file": directory / "valid.jsonl", "model__block_size": 32, "validation__every_n_steps": 2,
            "sampling__max_new_tokens": 2, "sampling__num_samples": 1,
        }  # fmt: skip
        self.run = directory / "run"
        with contextlib.redirect_stdout(io.StringIO()):
            call(train.main, *flags(dataset, self.run, **self.run_settings | {"training__max_steps": 1}))
        changes = list(changed_settings())
        random.Random(0).shuffle(changes)
        self.changed_settings = itertools.cycle(changes)

    def all(self) -> dict[str, Callable[[random.Random], None]]:
        """Return the methods `fuzz_KIND` by kind."""
        return {name.removeprefix("fuzz_"): getattr(self, name) for name in dir(self) if name.startswith("fuzz_")}

    def copy(self, source: Path) -> Path:
        target = self.directory / "copy"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target)
        return target

    def fuzz_setting(self, rng: random.Random) -> None:
        """Change one field of the configuration. If it is accepted, the run must train."""
        changes = next(self.changed_settings)
        out = self.directory / "changed"
        shutil.rmtree(out, ignore_errors=True)
        arguments = [*flags(self.dataset, out, rng.choice(("gpt2", "modern")), **self.run_settings), *changes]
        try:
            resolve(parse(arguments)[1], rng.choice((2, 8)))
        except UserError:
            pass
        except SystemExit as error:
            raise_user_error(error)
        self.train(arguments)

    def fuzz_resumed_run(self, rng: random.Random) -> None:
        """Corrupt a file of the run directory or of its last checkpoint, and resume the run."""
        run = self.copy(self.run)
        last = checkpoint.list_checkpoints(run)[-1]
        for path in checkpoint.list_checkpoints(run)[:-1]:
            shutil.rmtree(path)
        self.corrupt_file(last if rng.random() < 0.7 else run, rng)
        self.train([*flags(self.dataset, run, **self.run_settings), "--general.init-from", "resume"])

    def train(self, arguments: list[str]) -> None:
        try:
            with contextlib.chdir(self.directory):  # unusual paths are relative to it
                call(train.main, *arguments)
        except SystemExit as error:
            raise_user_error(error)

    def corrupt_file(self, directory: Path, rng: random.Random) -> None:
        """Corrupt one file of a directory; in half of the checkpoints, update the manifest so that it matches."""
        files = [path for path in directory.iterdir() if path.is_file() and path.stat().st_size]
        path = rng.choice([path for path in files if path.name != "manifest.json" or rng.random() < 0.3])
        if path.suffix == ".json" and rng.random() < 0.7:
            path.write_text(corrupt_json(path.read_text(), rng))
        else:
            path.write_bytes(corrupt(path.read_bytes(), rng))
        if (directory / "manifest.json").exists() and path.name != "manifest.json" and rng.random() < 0.5:
            names = ("model.safetensors", "optimizer.pt", "state.json")
            hashes = {name: checkpoint.sha256(directory / name) for name in names}
            (directory / "manifest.json").write_text(json.dumps({"files": hashes}))

    def fuzz_hellaswag_file(self, rng: random.Random) -> None:
        lines = self.questions.splitlines()
        i = rng.randrange(len(lines))
        kind = rng.randrange(2)
        data = "\n".join([*lines[:i], corrupt_json(lines[i], rng), *lines[i + 1 :]]).encode("utf-8", "surrogatepass")
        path = self.directory / "questions.jsonl"
        path.write_bytes(data if kind else corrupt(self.questions.encode(), rng))
        load_examples(path, self.tokenizer, rng.choice(("karpathy", "lm-eval")))

    def fuzz_dataset(self, rng: random.Random) -> None:
        directory = self.copy(self.dataset)
        path = rng.choice([path for path in directory.iterdir() if path.is_file()])
        if path.suffix == ".json" and rng.random() < 0.8:
            path.write_text(corrupt_json(path.read_text(), rng))
        else:
            path.write_bytes(corrupt(path.read_bytes(), rng))
        dataset = open_dataset(directory)
        load_tokenizer(dataset.tokenizer)
        if rng.random() < 0.3:
            verify(directory)

    def fuzz_checkpoint(self, rng: random.Random) -> None:
        directory = self.copy(self.checkpoint)
        self.corrupt_file(directory, rng)
        checkpoint.load(directory)
        GPT.from_pretrained(directory)

    def fuzz_log(self, rng: random.Random) -> None:
        path = self.directory / "log.csv"
        path.write_bytes(corrupt(self.log, rng))
        assert all(row.keys() == set(COLUMNS) for row in read_log(path))

    def fuzz_corpus(self, rng: random.Random) -> None:
        name = rng.choice(("corpus.jsonl", "corpus.jsonl.gz", "corpus.jsonl.zst", "corpus.txt", "corpus.parquet"))
        path = self.directory / name
        texts = ["A text.", "Another\u2028one.", "", "\x00\ufeff", "x" * 10_000]
        if name.endswith(".parquet"):
            pq.write_table(pa.table({"text": texts}), path)
        else:
            save_jsonl(path, texts)
        path.write_bytes(corrupt(path.read_bytes(), rng))
        for _ in read_documents(find("files", (str(path),))):
            pass


def fuzz(inputs: MalformedInputs, count: int, seed: int = 0) -> tuple[dict[str, Counter], list[str]]:
    """Read `count` malformed inputs, the kinds in turn.

    Returns, for each kind, how many were rejected (UserError), accepted, and failed with another exception, and a
    description of each failure.
    """
    counts, failures = {kind: Counter() for kind in inputs.all()}, []
    for i in range(count):
        kind = list(counts)[i % len(counts)]
        rng = random.Random(f"{seed} {i}")
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                inputs.all()[kind](rng)
            counts[kind]["accepted"] += 1
        except UserError as error:
            counts[kind]["rejected"] += 1
            if not str(error).strip():
                failures.append(f"{kind}, {i}: the message is empty")
        except BaseException as error:  # a panic of a Rust library is not an Exception
            if isinstance(error, KeyboardInterrupt):
                raise
            counts[kind]["failed"] += 1
            failures.append(f"{kind}, {i}: {error!r}"[:300])
    return counts, failures


def main() -> None:
    count = int(sys.argv[1])
    with tempfile.TemporaryDirectory() as directory:
        counts, failures = fuzz(MalformedInputs(make_small_dataset(Path(directory)), Path(directory)), count)
    print("| malformed input | rejected with a message | accepted | other exception |\n|---|---:|---:|---:|")
    for kind, c in counts.items():
        print(f"| {kind.replace('_', ' ')} | {c['rejected']:,} | {c['accepted']:,} | {c['failed']:,} |")
    print(*failures, sep="\n")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
