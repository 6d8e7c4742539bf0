"""Run the same commands in two checkouts and check that their results are bitwise equal.

    python benchmarks/equivalence.py main .                         # OLD and NEW: checkouts or git revisions
    python benchmarks/equivalence.py main . --compare data,train    # only these comparisons
    python benchmarks/equivalence.py main . --keep out/equivalence  # keep the files

Each command runs on the CPU, with one thread per process. The comparisons are

- data: a tokenizer trained on a text sample, and the datasets of that sample for it and for GPT-2's tokenizer;
- train: log.csv (without timing and memory), samples.txt, weights and optimizer tensors of 20 steps of the presets
  `gpt2` and `modern` at a tiny size, in float32 and bfloat16, with W = 1 and W = 2 processes. The runs use dropout and
  several micro-steps, cross the end of an epoch, and include validation, HellaSwag and samples;
- hellaswag: the loss of each ending of 50 generated examples in both styles, in float32 and bfloat16;
- sample: 64 greedy and 64 sampled tokens for each of two prompts, as the text that sample.py prints.

A checkout reads only its own datasets and runs, so a difference in one comparison can reappear in later ones. Differing
values are printed as OLD / NEW. A relative difference is the largest absolute difference divided by the largest
absolute value of OLD. Files with paths or timing (NAMES_ONLY) must exist in both, but their content is not compared.
The exit code is 0 if all results are equal, 1 if not, 2 if a command fails.
"""

import argparse
import csv
import json
import os
import random
import re
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
COMPARISONS = ("data", "train", "hellaswag", "sample")
MEASUREMENTS = {"step_ms", "tokens_per_s", "mfu", "memory_mib", "elapsed_s"}  # columns of log.csv that are not compared
NAMES_ONLY = {
    "config.json",
    "state.json",
    "manifest.json",
    "plot.png",
    "report.html",
}  # files whose content is not compared
RENAMES = {  # parameter names: regular expression and replacement, for OLD and NEW
    r"\bv_mix$": "value_lambdas",
    r"\bx_mix$": "x0_lambdas",
    r"\bskip_mix$": "skip_lambdas",
}
PRESETS = {"gpt2": ("--optimizer.warmup-steps", 5, "--optimizer.max-lr", 3e-3), "modern": ()}
TRAIN_FLAGS = (
    "--general.device", "cpu", "--training.compile", "off", "--data.num-streams", 4, "--data.chunk-tokens", 1000,
    "--model.block-size", 64, "--model.n-layer", 4, "--model.n-head", 2, "--model.n-embd", 32, "--model.dropout", 0.1,
    "--training.max-steps", 20, "--training.micro-batch-size", 4, "--training.batch-tokens", 4 * 4 * 64,
    "--validation.every-n-steps", 10, "--evaluation.every-n-steps", 10, "--evaluation.limit", 24,
    "--sampling.every-n-steps", 10, "--sampling.num-samples", 2, "--sampling.max-new-tokens", 16,
)  # fmt: skip
SAMPLE_FLAGS = (
    "--max-new-tokens", 64, "--top-k", 50, "--top-p", 0.95, "--device", "cpu", "--dtype", "float32",
)  # fmt: skip


@dataclass(frozen=True)
class CheckoutCommands:
    """Commands that differ between checkouts."""

    train_tokenizer: tuple[str, ...]
    load_model: str  # Python code that loads the run directory sys.argv[1] as `model` and `tokenizer`


FLAT = CheckoutCommands(
    ("tokenizer.py", "train"),
    """
import sys, torch
from checkpoint import load_model
from tokenizer import load_tokenizer
loaded = load_model(sys.argv[1], torch.device("cpu"))
model, tokenizer = loaded.model, load_tokenizer(loaded.tokenizer)
""",
)
PACKAGE = CheckoutCommands(  # checkouts with the package babygpt/
    ("-m", "tools.train_tokenizer"),
    """
import sys, torch
from model import GPT
model = GPT.from_pretrained(sys.argv[1], device=torch.device("cpu"))
tokenizer = model.tokenizer
""",
)
WRITE_LOSSES = """
import json, pathlib
from hellaswag import load_examples, losses
file, style, out = sys.argv[2:]
examples, rows = load_examples(pathlib.Path(file), tokenizer, style, None), {}
for dtype in ("float32", "bfloat16"):
    for i, row in enumerate(losses(model, examples, torch.device("cpu"), dtype).tolist()):
        rows[f"{dtype} example {i}"] = [loss.hex() for loss in row]
pathlib.Path(out).write_text(json.dumps(rows))
"""


# ---------------------------------------------------------------------------------------------------------
# the commands


@dataclass(frozen=True)
class Checkout:
    """A checkout, the directory of the shared inputs and the directory for its output."""

    path: Path
    inputs: Path
    output: Path

    @property
    def commands(self) -> CheckoutCommands:
        return PACKAGE if (self.path / "babygpt").is_dir() else FLAT

    def python(self, *arguments: object) -> bytes:
        """Run Python in the checkout and return its standard output."""
        return execute([sys.executable, *map(str, arguments)], self.path)


def execute(command: list[str], directory: Path) -> bytes:
    """Return the standard output of a command. If it fails, print the end of its standard error and exit with 2."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, cwd=directory, env=environment, stdin=subprocess.DEVNULL, capture_output=True)
    if process.returncode:
        print(f"error: exit code {process.returncode} in {directory}: {shlex.join(command)}", file=sys.stderr)
        print(process.stderr.decode(errors="replace")[-4000:], file=sys.stderr)
        raise SystemExit(2)
    return process.stdout


@contextmanager
def checked_out(spec: str, worktree: Path) -> Iterator[Path]:
    """Yield the path of a checkout: `spec` if it is a directory, or a temporary worktree of that revision."""
    if Path(spec).is_dir():
        yield Path(spec).resolve()
        return
    execute(["git", "worktree", "add", "--detach", str(worktree), spec], ROOT)
    try:
        yield worktree
    finally:
        execute(["git", "worktree", "remove", "--force", str(worktree)], ROOT)


def train_tokenizer(checkout: Checkout) -> Path:
    """Write the tokenizer trained on the text sample."""
    out = checkout.output / "bpe.json"
    if not out.exists():
        command = (*checkout.commands.train_tokenizer, "files", "--input", checkout.inputs / "texts.jsonl")
        checkout.python(*command, "--vocab-size", 400, "--out", out)
    return out


def prepare(checkout: Checkout, tokenizer: str) -> Path:
    """Write the dataset of the text sample, in several shards; `tokenizer` is "gpt2" or "trained"."""
    out = checkout.output / f"data-{tokenizer}"
    if not out.exists():
        checkout.python(
            "fineweb.py", "files", "--input", checkout.inputs / "texts.jsonl", "--out-dir", out, "--workers", 1,
            "--tokenizer", train_tokenizer(checkout) if tokenizer == "trained" else tokenizer,
            "--val-tokens", 2000, "--shard-tokens", 5000,
        )  # fmt: skip
    return out


def train(checkout: Checkout, preset: str, dtype: str = "float32", world_size: int = 1) -> Path:
    """Write the run directory of a tiny model."""
    out = checkout.output / f"run-{preset}-{dtype}-{world_size}"
    torchrun = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}")
    if not out.exists():
        checkout.python(
            *(torchrun if world_size > 1 else ()), "train.py", preset, *TRAIN_FLAGS, *PRESETS[preset],
            "--general.out-dir", out, "--data.dataset", prepare(checkout, "trained"), "--training.dtype", dtype,
            "--evaluation.file", checkout.inputs / "hellaswag.jsonl", *order_flags(checkout),
        )  # fmt: skip
    return out


def order_flags(checkout: Checkout) -> tuple[object, ...]:
    """Return the flags for version 1 of the data order, the only version that all checkouts support."""
    settings = (checkout.path / "train_config.py").read_text(encoding="utf-8")
    return ("--data.order", 1) if re.search(r"^    order: Literal", settings, re.MULTILINE) else ()


def hellaswag(checkout: Checkout, preset: str, style: str) -> Path:
    """Write the losses of all endings, as hexadecimal float64."""
    out, code = checkout.output / f"losses-{preset}-{style}.json", checkout.commands.load_model + WRITE_LOSSES
    checkout.python("-c", code, train(checkout, preset), checkout.inputs / "hellaswag.jsonl", style, out)
    return out


def sample(checkout: Checkout, preset: str, temperature: float) -> Path:
    """Write the text that sample.py prints."""
    out, run = checkout.output / f"sample-{preset}-{temperature}.txt", train(checkout, preset)
    texts = [
        checkout.python("sample.py", run, "--prompt", prompt, *SAMPLE_FLAGS, "--temperature", temperature)
        for prompt in ("def ", "The meaning of life is")
    ]
    out.write_bytes(b"".join(texts))
    return out


# ---------------------------------------------------------------------------------------------------------
# the inputs


def write_texts(path: Path) -> None:
    """Write the first 700 characters of 48 files of the standard library, and edge cases."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:48]
    texts = [file.read_text(encoding="utf-8")[:700] for file in files]
    texts[8:8] = ["Zażółć gęślą jaźń. 日本語 🙂 e\u0301", "A literal <|endoftext|> is ordinary text.", "", texts[0]]
    write_jsonl(path, ({"text": text} for text in texts))


def write_examples(path: Path) -> None:
    """Write HellaSwag examples of different lengths, half in the style of ActivityNet and half in that of WikiHow."""
    choice = random.Random(0).choice
    people, verbs = ("A man", "the woman", "Two children", "she"), ("opens", "sees", "is in", "paints", "moves")
    things = ("the door", "a red ball", "rice", "cars in front of the house", "3 eggs", "a café")
    rows = []
    for i in range(50):
        actions = [f"{choice(verbs)} {choice(things)}" for _ in range(8)]
        if i % 2 == 0:
            label, ctx_b = "Cleaning windows", choice(people)
            ctx_a = " ".join(f"{choice(people)} {action}." for action in actions[: 1 + i // 2 % 4])
            endings = [f"{action}{' again' * k}." for k, action in enumerate(actions[4:])]
        else:
            label, ctx_b = "Home and Garden", ""
            ctx_a = f"[header] How to move {choice(things)} [title] Begin. [step] {choice(people)} {actions[0]}."
            endings = [f"[title] It {action} [step] Stop{'!' * k}" for k, action in enumerate(actions[4:])]
        row = {"ind": i, "activity_label": label, "ctx_a": ctx_a, "ctx_b": ctx_b, "ctx": f"{ctx_a} {ctx_b}".strip()}
        rows.append(row | {"label": i % 4, "endings": endings, "source_id": ("activitynet~v", "wikihow~1")[i % 2]})
    write_jsonl(path, rows)


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------
# comparisons: functions return one line per difference


def compare(old: Path, new: Path) -> list[str]:
    """Compare two files, or all files of two directories."""
    if old.is_dir():
        names = file_names(old), file_names(new)
        shared = sorted(set(names[0]) & set(names[1]))
        lines = [f"{name}: {line}" for name in shared for line in compare(old / name, new / name)]
        return compare_names(*names) + lines
    if old.name in NAMES_ONLY:
        return []
    if old.name == "log.csv":
        return compare_logs(read_log(old), read_log(new))
    if old.suffix in (".safetensors", ".pt") or old.name.startswith("losses-"):
        return compare_tensors(read_tensors(old), read_tensors(new))
    return compare_bytes(old.read_bytes(), new.read_bytes())


def file_names(directory: Path) -> list[str]:
    return [str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()]


def compare_names(old: Iterable[str], new: Iterable[str]) -> list[str]:
    missing = (("OLD", sorted(set(old) - set(new))), ("NEW", sorted(set(new) - set(old))))
    return [f"{len(names)} in {side} only: {', '.join(names[:3])}" for side, names in missing if names]


def compare_bytes(old: bytes, new: bytes) -> list[str]:
    if old == new:
        return []
    first = next((i for i, (o, n) in enumerate(zip(old, new, strict=False)) if o != n), min(len(old), len(new)))
    part = slice(max(0, first - 12), first + 12)
    return [f"{len(old):,} / {len(new):,} bytes, different from byte {first:,}: {old[part]!r} / {new[part]!r}"]


def read_log(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return [{name: row[name] for name in row if name not in MEASUREMENTS} for row in csv.DictReader(file)]


def compare_logs(old: list[dict[str, str]], new: list[dict[str, str]]) -> list[str]:
    """Return the first difference and the largest differences of both losses."""
    if len(old) != len(new) or old[0].keys() != new[0].keys():
        return [f"{len(old)} / {len(new)} rows", *compare_names(old[0], new[0])]
    rows = list(zip(old, new, strict=True))
    differing = ((o["step"], name, o[name], n[name]) for o, n in rows for name in o if o[name] != n[name])
    if (first := next(differing, None)) is None:
        return []
    lines = ["step {}, {}: {} / {}".format(*first)]
    for name in ("loss", "val_loss"):
        pairs = [(float(o[name]), float(n[name])) for o, n in rows if o[name] and n[name]]
        lines.append(f"{name}: {difference_size(*torch.tensor(pairs, dtype=torch.float64).unbind(1))}")
    return ["; ".join(lines)]


def difference_size(old: torch.Tensor, new: torch.Tensor) -> str:
    largest = (old.double() - new.double()).abs().max()
    return f"largest difference {largest:.3g}, relative {largest / old.double().abs().max():.3g}"


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read weights, optimizer tensors or losses, by name."""
    if path.suffix == ".safetensors":
        return {map_name(name): tensor for name, tensor in load_file(path).items()}
    if path.suffix == ".pt":
        parameters = torch.load(path, map_location="cpu", weights_only=True)
        return {f"{map_name(name)} {key}": t for name, tensors in parameters.items() for key, t in tensors.items()}
    rows = json.loads(path.read_text())
    return {name: torch.tensor(list(map(float.fromhex, row)), dtype=torch.float64) for name, row in rows.items()}


def map_name(name: str) -> str:
    for pattern, replacement in RENAMES.items():
        name = re.sub(pattern, replacement, name)
    return name


def compare_tensors(old: dict[str, torch.Tensor], new: dict[str, torch.Tensor]) -> list[str]:
    """Compare names, shapes and dtypes, then count the differing tensors and find the largest difference."""
    lines = compare_names(old, new)
    pairs = {name: (old[name], new[name]) for name in old if name in new}
    for name, (o, n) in list(pairs.items()):
        if (o.shape, o.dtype) != (n.shape, n.dtype):
            lines.append(f"{name}: {o.dtype} {[*o.shape]} in OLD, {n.dtype} {[*n.shape]} in NEW")
            del pairs[name]
    sizes = {name: (o.double() - n.double()).abs().max() for name, (o, n) in pairs.items() if not same_bits(o, n)}
    if sizes:
        name = max(sizes, key=lambda name: sizes[name].item())
        lines.append(
            f"{len(sizes)} of {len(old)} tensors differ; the largest difference is in {name}: "
            f"{difference_size(*pairs[name])}"
        )
    return lines


def same_bits(old: torch.Tensor, new: torch.Tensor) -> bool:
    """Return whether all bits are equal, including NaN and the sign of zero, unlike torch.equal."""
    old_bytes, new_bytes = (tensor.contiguous().flatten().view(torch.uint8) for tensor in (old, new))
    return torch.equal(old_bytes, new_bytes)


# ---------------------------------------------------------------------------------------------------------
# comparisons


def results(comparison: str, checkouts: list[Checkout]) -> Iterator[tuple[str, list[Path]]]:
    """Run the commands of a comparison and yield a description and the output path in each checkout."""
    if comparison == "data":
        yield "trained tokenizer", [train_tokenizer(checkout) for checkout in checkouts]
        for tokenizer in ("gpt2", "trained"):
            yield f"dataset, {tokenizer} tokenizer", [prepare(checkout, tokenizer) for checkout in checkouts]
    if comparison == "train":
        for run in product(PRESETS, ("float32", "bfloat16"), (1, 2)):
            yield "train {}, {}, W = {}".format(*run), [train(checkout, *run) for checkout in checkouts]
    if comparison == "hellaswag":
        for evaluation in product(PRESETS, ("karpathy", "lm-eval")):
            yield "HellaSwag losses, {}, {}".format(*evaluation), [hellaswag(c, *evaluation) for c in checkouts]
    if comparison == "sample":
        for sampling in product(PRESETS, (0.0, 0.8)):
            yield "sample {}, temperature {}".format(*sampling), [sample(c, *sampling) for c in checkouts]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", metavar="OLD", help="path of a checkout, or a git revision")
    parser.add_argument("new", metavar="NEW", help="checkout to compare with OLD, as a path or revision")
    parser.add_argument(
        "--compare", default=",".join(COMPARISONS), help="comma-separated comparisons (default: %(default)s)"
    )
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="keep the files in this directory, which must be new or empty"
    )
    options = parser.parse_args()
    options.compare = options.compare.split(",")
    if unknown := [name for name in options.compare if name not in COMPARISONS]:
        parser.error(f"--compare {unknown[0]} is not one of the comparisons. Choose from {','.join(COMPARISONS)}.")
    if options.keep and options.keep.exists() and any(options.keep.iterdir()):
        parser.error(f"--keep {options.keep} is not empty. Use a new directory.")
    return options


def main() -> int:
    options, equal, total = parse_arguments(), 0, 0
    with ExitStack() as stack:
        directory = (options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))).resolve()
        (directory / "inputs").mkdir(parents=True)
        write_texts(directory / "inputs" / "texts.jsonl")
        write_examples(directory / "inputs" / "hellaswag.jsonl")
        checkouts = []
        for side in ("old", "new"):
            path = stack.enter_context(checked_out(getattr(options, side), directory / f"checkout-{side}"))
            (directory / side).mkdir()
            checkouts.append(Checkout(path, directory / "inputs", directory / side))
        for comparison in options.compare:
            for name, paths in results(comparison, checkouts):
                differences = compare(*paths)
                print("\n  ".join([f"{name}: {'different' if differences else 'equal'}", *differences]), flush=True)
                total, equal = total + 1, equal + (not differences)
    print(f"{equal} of {total} results are equal")
    return 0 if equal == total else 1


if __name__ == "__main__":
    sys.exit(main())
