"""Malformed input by the thousand: every kind is made from something sound, and only a UserError may come of it.

python tests/support/fuzzing.py 10000            # prints a table; tests/faults/test_faults.py runs a few hundred
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
from train_config import Config, parse, preset, resolve

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


# an odd value makes these so large that a run would be as good as endless, as was asked for
SIZES = {
    "max_steps", "n_layer", "n_head", "n_embd", "max_new_tokens", "num_samples", "window", "block_size", "vocab_size",
    "value_embeddings",
}  # fmt: skip


def changed_settings() -> Iterator[list[str]]:
    """Words of a command line that change one field: every one to every odd value and to what its type knows."""
    for section in dataclasses.fields(Config):
        for field in dataclasses.fields(getattr(preset("modern"), section.name)):
            flag = f"--{section.name}.{field.name.replace('_', '-')}"
            if field.type is bool:
                yield [flag]
                yield [f"--{section.name}.no-{field.name.replace('_', '-')}"]
            for choice in get_args(field.type):
                if isinstance(choice, str) and (field.name, choice) != ("compile", "on"):  # takes minutes
                    yield [flag, choice]
            for value in ODD:
                too_large = field.name in SIZES and isinstance(value, int | float) and value > 1000
                if not too_large and (field.name, value) not in (("out_dir", "/"), ("out_dir", "../..")):
                    yield [flag, *(map(str, value) if isinstance(value, list) else [str(value)])]


def told(end: SystemExit) -> None:
    """A mistake that tyro told by itself, as one of ours."""
    if end.code == 2:
        raise UserError("told by tyro") from None
    raise end


def small_dataset(folder: Path) -> Path:
    """A sound data set of a few documents."""
    rng = random.Random(0)
    texts = [
        " ".join(rng.choices(["the", "a", "of", "and", "model", "data", "token", "loss", "step"], k=30))
        for _ in range(30)
    ]
    return make_tiny_dataset(texts, folder, 280)


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
        self.small = {
            "training__max_steps": 2, "model__n_layer": 1, "evaluation__every_n_steps": 2, "sampling__every_n_steps": 2,
            "evaluation__file": folder / "sound.jsonl", "model__block_size": 32, "validation__every_n_steps": 2,
            "sampling__max_new_tokens": 2, "sampling__num_samples": 1,
        }  # fmt: skip
        self.run = folder / "run"
        with contextlib.redirect_stdout(io.StringIO()):
            call(train.main, *flags(dataset, self.run, **self.small | {"training__max_steps": 1}))
        changes = list(changed_settings())
        random.Random(0).shuffle(changes)
        self.settings = itertools.cycle(changes)

    def all(self) -> dict[str, Callable[[random.Random], None]]:
        return {name: getattr(self, name) for name in dir(self) if name.startswith("a_")}

    def copy(self, source: Path) -> Path:
        target = self.folder / "made"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target)
        return target

    def a_setting(self, rng: random.Random) -> None:
        """One field of the configuration changed; what is taken must train."""
        changed = next(self.settings)
        out = self.folder / "changed"
        shutil.rmtree(out, ignore_errors=True)
        line = [*flags(self.dataset, out, rng.choice(("gpt2", "modern")), **self.small), *changed]
        try:
            resolve(parse(line)[1], rng.choice((2, 8)))
        except UserError:
            pass
        except SystemExit as end:
            told(end)
        self.train(line)

    def a_run_to_go_on_with(self, rng: random.Random) -> None:
        """A file of its folder damaged or rewritten, half of them by someone who makes the manifest fit."""
        run = self.copy(self.run)
        last = checkpoint.checkpoints(run)[-1]
        for path in checkpoint.checkpoints(run)[:-1]:
            shutil.rmtree(path)
        self.spoil(last if rng.random() < 0.7 else run, rng)
        self.train([*flags(self.dataset, run, **self.small), "--general.init-from", "resume"])

    def train(self, line: list[str]) -> None:
        try:
            with contextlib.chdir(self.folder):  # an odd name of a folder is one in here
                call(train.main, *line)
        except SystemExit as end:
            told(end)

    def spoil(self, folder: Path, rng: random.Random) -> None:
        """One file of a folder; of a checkpoint every second time so that its manifest fits."""
        files = [path for path in folder.iterdir() if path.is_file() and path.stat().st_size]
        path = rng.choice([path for path in files if path.name != "manifest.json" or rng.random() < 0.3])
        if path.suffix == ".json" and rng.random() < 0.7:
            path.write_text(odd_json(path.read_text(), rng))
        else:
            path.write_bytes(damaged(path.read_bytes(), rng))
        if (folder / "manifest.json").exists() and path.name != "manifest.json" and rng.random() < 0.5:
            names = ("model.safetensors", "optimizer.pt", "state.json")
            sums = {name: checkpoint.sha256(folder / name) for name in names}
            (folder / "manifest.json").write_text(json.dumps({"files": sums}))

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
        folder = self.copy(self.checkpoint)
        self.spoil(folder, rng)
        checkpoint.load(folder)
        GPT.from_pretrained(folder)

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
        for _ in read_documents(find("files", (str(path),))):
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
        except BaseException as error:  # a panic of a library in Rust is no Exception
            if isinstance(error, KeyboardInterrupt):
                raise
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
