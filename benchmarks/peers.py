"""Compare training recipes: nanoGPT and nanochat run their own scripts on our rows, and all are evaluated alike.

    python benchmarks/peers.py DATASET --nanochat PATH --nanogpt PATH --jobs 2 --out results/recipe/peers.md
    python benchmarks/peers.py DATASET --nanochat PATH --projects modern nanochat --compile --tokens 1638400

PATH is a checkout of the project; its files are neither changed nor copied. DATASET is a prepared dataset with a small
vocabulary (`python -m tools.train_tokenizer --vocab-size 8192`). Each run reads the rows of our data order in the same
sequence, 4,096 tokens per step, and trains a model of 4 layers of width 128 with a context of 256 tokens. nanochat and
nanoGPT get the rows through replaced data loaders; their models, optimizers and schedules are their own.

A first sweep multiplies all learning rates of a project by each of --factors, at the second of --tokens and with the
first seed, and then, at the best factor, its weight decay by each of --decays. The best trial of each project is used
for the table. All get the same number of trials, except modern, which has no weight decay and gets fewer.

nanochat scales its rates by the square root of the batch size relative to 524,288 tokens; a factor of 1 undoes this.
Its warmup of 40 steps is shortened to at most a tenth of the run. Without --compile, nothing is compiled. nanoGPT's
script trains in float32 on a CPU, the others train in bfloat16.

The loss is the mean over the first --val-tokens tokens of the validation split, under bfloat16 autocast. The seconds
are those of the training steps, including compilation but not evaluation. A finished run is repeated only if the
code of the project, this file, the dataset or a setting has changed.
"""

import argparse
import functools
import hashlib
import importlib
import json
import math
import os
import pickle
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

from babygpt.data.shards import Dataset, open_dataset  # noqa: E402
from babygpt.nn.cross_entropy import IGNORE_INDEX  # noqa: E402
from benchmarks.table import machine, map_jobs, write_table  # noqa: E402
from dataloader import DataLoader, Order, Position, inputs_and_targets, validation_batches, validation_rows  # noqa: E402

T, N_LAYER, N_HEAD, N_EMBD = 256, 4, 4, 128
ROWS = 16  # per step
CPU = torch.device("cpu")
CLASSIC_LR = 4e-3  # the best of the classic recipe at this size (results/recipe/recipe.md)


@dataclass(frozen=True)
class Run:
    """One training run, in a process of its own."""

    project: str  # modern, gpt2, nanochat, nanogpt
    dataset: str
    checkout: str  # of nanochat or nanoGPT
    steps: int
    seed: int
    factor: float  # of all learning rates
    decay: float  # factor of the weight decay
    compile: bool
    val_tokens: int

    @property
    def name(self) -> str:
        """The main settings, and a hash of all settings, the code and the dataset."""
        compiled = "-compiled" if self.compile else ""
        settings = asdict(self) | {"checkout": code_version(self.checkout or ROOT), "dataset": ""}
        values = f"{settings} {Path(__file__).read_text()} {open_dataset(self.dataset).fingerprint}"
        digest = hashlib.sha256(values.encode()).hexdigest()[:8]
        return f"{self.project}-{self.steps}-{self.seed}-{self.factor:g}-{self.decay:g}{compiled}-{digest}"


class TimedRows:
    """The rows of our data order as (inputs, targets) per step, with the time at which each was requested."""

    def __init__(self, dataset: Dataset, run: Run):
        order = Order(dataset.train, dataset.eot_id, T, None, run.seed)
        self.loader = DataLoader(order, Position(), ROWS, ROWS, 0, 1, CPU)
        self.times: list[float] = []

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        while True:
            (rows,) = next(self.loader).micro_batches
            self.times.append(time.perf_counter())
            idx, targets = inputs_and_targets(rows, CPU)
            yield idx, targets.contiguous()  # views would be rejected by nanochat


@functools.cache
def code_version(path: str | Path) -> str:
    """Return the commit of a checkout, and its uncommitted changes."""
    commands = (["rev-parse", "HEAD"], ["diff", "HEAD"])
    return "".join(
        subprocess.run(["git", "-C", str(path), *command], check=True, capture_output=True, text=True).stdout
        for command in commands
    )


def stub(name: str, **attributes: object) -> None:
    """Provide a module that a script imports but does not use here."""
    module = ModuleType(name)
    vars(module).update(attributes)
    sys.modules[name] = module


def train_nanochat(run: Run, dataset: Dataset) -> tuple[torch.nn.Module, list[float]]:
    """Run nanochat's scripts/base_train.py. Return the model and the times of the steps."""
    os.environ["NANOCHAT_DTYPE"], os.environ["NANOCHAT_BASE_DIR"] = "bfloat16", os.getcwd()
    sys.path.insert(0, run.checkout)
    rows, vocab_size = TimedRows(dataset, run), dataset.vocab_size
    stub("wandb")
    stub("scripts.base_eval", evaluate_core=None)
    tokenizer = SimpleNamespace(get_vocab_size=lambda: vocab_size)
    stub("nanochat.tokenizer", get_tokenizer=lambda: tokenizer, get_token_bytes=lambda device: None)
    stub("nanochat.engine", Engine=None)
    stub("nanochat.loss_eval", evaluate_bpb=None)
    stub("nanochat.checkpoint_manager", save_checkpoint=lambda *_, **__: None, load_checkpoint=None)
    stub(
        "nanochat.dataloader",
        tokenizing_distributed_data_loader_with_state_bos_bestfit=lambda *_, **__: (
            (idx, targets, {"epoch": 0, "pq_idx": 0, "rg_idx": 0}) for idx, targets in rows
        ),
        tokenizing_distributed_data_loader_bos_bestfit=None,
    )
    common = importlib.import_module("nanochat.common")
    compute_init = common.compute_init

    def seeded(device_type: str) -> object:
        result = compute_init(device_type)
        torch.manual_seed(run.seed)
        return result

    batch_scale = math.sqrt(2**19 / (ROWS * T))
    rates = {"embedding": 0.3, "unembedding": 0.008, "matrix": 0.02, "scalar": 0.5}  # its defaults
    weight_decay = 0.28  # its default, which it scales by batch, width and number of layers
    sys.argv = ["base_train", "--device-type", "cpu", "--depth", str(N_LAYER), "--aspect-ratio", str(N_EMBD // N_LAYER)]
    sys.argv += ["--head-dim", str(N_EMBD // N_HEAD), "--max-seq-len", str(T), "--window-pattern", "L"]
    sys.argv += ["--num-iterations", str(run.steps), "--device-batch-size", str(ROWS), "--total-batch-size"]
    sys.argv += [str(ROWS * T), "--eval-every", "-1", "--core-metric-every", "-1", "--sample-every", "-1"]
    sys.argv += ["--warmup-steps", str(min(40, run.steps // 10)), "--weight-decay", str(weight_decay * run.decay)]
    for name, rate in rates.items():
        sys.argv += [f"--{name}-lr", str(rate * batch_scale * run.factor)]
    with mock.patch.object(common, "compute_init", seeded):
        result = runpy.run_module("scripts.base_train", run_name="__main__")
    return result["orig_model"], [*rows.times[: run.steps], time.perf_counter()]


def train_nanogpt(run: Run, dataset: Dataset) -> tuple[torch.nn.Module, list[float]]:
    """Run nanoGPT's train.py. Return the model and the times of the steps."""
    rows, data = TimedRows(dataset, run), Path("data/rows")
    data.mkdir(parents=True)
    for name in ("configurator.py", "model.py"):
        os.symlink(Path(run.checkout) / name, name)
    with open(data / "train.bin", "wb") as file:
        for _ in range(run.steps + 2):
            (batch,) = next(rows.loader).micro_batches
            file.write(batch.numpy().astype("<u2").tobytes())
    (data / "val.bin").symlink_to("train.bin")
    (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": dataset.vocab_size}))
    times: list[float] = []

    def next_rows(high: int, size: tuple[int], **_: object) -> torch.Tensor:
        """Replace torch.randint in get_batch: the offsets of the next rows, or of the first ones in an evaluation."""
        if sys._getframe(2).f_code.co_name == "estimate_loss":
            times[-1] = time.perf_counter()  # start after the evaluation before the first step
            return torch.arange(ROWS) * (T + 1)
        times.append(time.perf_counter())
        return (torch.arange(ROWS) + ROWS * (len(times) - 1)) * (T + 1)

    lr = CLASSIC_LR * run.factor
    settings = {
        "device": "cpu", "dtype": "float32", "compile": run.compile, "dataset": "rows", "out_dir": "out",
        "eval_interval": run.steps + 1, "eval_iters": 1, "log_interval": 1000, "block_size": T, "batch_size": ROWS,
        "gradient_accumulation_steps": 1, "n_layer": N_LAYER, "n_head": N_HEAD, "n_embd": N_EMBD,
        "learning_rate": lr, "min_lr": lr / 10, "max_iters": run.steps - 1, "lr_decay_iters": run.steps,
        "warmup_iters": run.steps // 20, "weight_decay": 0.1 * run.decay,
    }  # fmt: skip
    sys.argv = ["train.py", *(f"--{name}={value}" for name, value in settings.items())]
    sys.path.insert(0, run.checkout)
    manual_seed = torch.manual_seed

    def seeded(seed: int) -> object:  # train.py's seed is fixed
        return manual_seed(run.seed)

    with mock.patch.object(torch, "randint", next_rows), mock.patch.object(torch, "manual_seed", seeded):
        result = runpy.run_path(str(Path(run.checkout) / "train.py"), run_name="__main__")
    return result["raw_model"], [*times[: run.steps], time.perf_counter()]


def train_ours(run: Run) -> tuple[torch.nn.Module, list[float]]:
    """Run train.py with the preset `run.project`. Return the model and the times of the steps."""
    from babygpt.training.log import column, read_log
    from model import GPT
    from train_config import preset

    optimizer = preset(run.project).optimizer
    if run.project == "gpt2":
        settings = {"max_lr": CLASSIC_LR * run.factor, "warmup_steps": run.steps // 20}
    else:
        names = ("max_lr", "embedding_lr", "head_lr", "scalar_lr")
        settings = {name: getattr(optimizer, name) * run.factor for name in names}
    settings["weight_decay"] = optimizer.weight_decay * run.decay
    command = [
        sys.executable, str(ROOT / "train.py"), run.project, "--general.mode", "train", "--general.out-dir", "out",
        "--general.seed", str(run.seed), "--general.device", "cpu", "--data.dataset", run.dataset,
        "--model.block-size", str(T), "--model.n-layer", str(N_LAYER), "--model.n-head", str(N_HEAD),
        "--model.n-embd", str(N_EMBD), "--training.batch-tokens", str(ROWS * T), "--training.micro-batch-size",
        str(ROWS), "--training.max-steps", str(run.steps), "--training.compile", "on" if run.compile else "off",
        "--training.dtype", "bfloat16", "--saving.every-n-steps", str(run.steps), "--logging.every-n-steps", "0",
    ]  # fmt: skip
    for name, value in settings.items():
        command += [f"--optimizer.{name.replace('_', '-')}", str(value)]
    subprocess.run(command, check=True, stdout=sys.stderr)
    step_ms = column(read_log(Path("out/log.csv")), "step_ms")[1]
    return GPT.from_pretrained("out"), (np.cumsum([0, *step_ms]) / 1000).tolist()


def mean_loss(model: torch.nn.Module, project: str, dataset: Dataset, val_tokens: int) -> float:
    """Return the mean loss over the first `val_tokens` tokens of the validation split, in nats per token."""
    loss_sum, count = 0.0, 0
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for idx, targets in validation_batches(dataset.val, T, ROWS):
            num_targets = int((targets != IGNORE_INDEX).sum())
            ignored = targets.masked_fill(targets == IGNORE_INDEX, -1)  # the others' value
            if project == "nanochat":
                loss = model(idx, ignored, loss_reduction="sum")
            elif project == "nanogpt":
                loss = model(idx, ignored)[1] * num_targets
            else:
                loss = model(idx, targets, reduction="sum")
            loss_sum, count = loss_sum + loss.item(), count + num_targets
            if count >= val_tokens:
                break
    return loss_sum / count


def work(run: Run) -> dict:
    """Train and evaluate in the current directory, which is temporary."""
    if not run.compile:  # also as a decorator with arguments
        torch.compile = lambda function=None, **_: function or (lambda decorated: decorated)  # type: ignore[assignment]
    dataset = open_dataset(run.dataset)
    if run.project == "nanochat":
        model, times = train_nanochat(run, dataset)
    elif run.project == "nanogpt":
        model, times = train_nanogpt(run, dataset)
    else:
        model, times = train_ours(run)
    return {
        **asdict(run),
        "loss": mean_loss(model, run.project, dataset, run.val_tokens),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": times[-1] - times[0],
        "step_seconds": statistics.median(b - a for a, b in pairwise(times)),
    }


class Runs:
    """Finished runs by name, each in a JSON file."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.directory = options, Path(options.runs)
        self.directory.mkdir(parents=True, exist_ok=True)

    def make(self, project: str, tokens: int, seed: int, factor: float, decay: float) -> Run:
        options, steps = self.options, round(tokens / (ROWS * T))
        checkout = {"nanochat": options.nanochat, "nanogpt": options.nanogpt}.get(project) or ""
        return Run(project, options.dataset, checkout, steps, seed, factor, decay, options.compile, options.val_tokens)

    def execute(self, run: Run) -> dict:
        """Return the result of a run, which is trained in a process of its own unless it has finished before."""
        path = self.directory / f"{run.name}.json"
        if not path.exists():
            environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}  # leave the checkouts as they are
            if self.options.jobs > 1:
                environment["OMP_NUM_THREADS"] = "1"
            with tempfile.TemporaryDirectory() as directory:
                command = [sys.executable, __file__, "--run", json.dumps(asdict(run)), "--result", "result.json"]
                done = subprocess.run(command, cwd=directory, capture_output=True, text=True, env=environment)
                if done.returncode:
                    sys.exit(f"error: {run.name} failed:\n{done.stderr[-3000:]}")
                path.write_text((Path(directory) / "result.json").read_text())
        result = json.loads(path.read_text())
        print(f"{run.name}: {result['loss']:.4f}, {result['seconds']:.0f} s", file=sys.stderr, flush=True)
        return result

    def execute_all(self, runs: list[Run]) -> list[dict]:
        return map_jobs(self.execute, runs, self.options.jobs)

    def sweep(self, projects: list[str], tokens: int) -> list[dict]:
        """Return the results of all trials: each factor of the learning rates, then each factor of weight decay."""
        options, seed = self.options, self.options.seeds[0]
        results = self.execute_all([self.make(p, tokens, seed, f, 1.0) for p in projects for f in options.factors])
        decays = [
            self.make(p, tokens, seed, best_of(results, p)["factor"], decay)
            for p in projects
            for decay in options.decays
            if p != "modern"
        ]
        return results + self.execute_all(decays)


def best_of(results: list[dict], project: str) -> dict:
    """Return the result of a project with the lowest loss."""
    return min((r for r in results if r["project"] == project), key=lambda r: r["loss"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", metavar="DATASET", nargs="?", help="directory of the prepared dataset")
    parser.add_argument("--nanochat", help="checkout of nanochat")
    parser.add_argument("--nanogpt", help="checkout of nanoGPT")
    parser.add_argument("--projects", nargs="+", default=["modern", "gpt2", "nanochat", "nanogpt"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[409_600, 819_200, 1_638_400, 3_276_800])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1337, 1338, 1339])
    parser.add_argument("--factors", nargs="+", type=float, default=[0.5, 0.71, 1.0, 1.41, 2.0])
    parser.add_argument("--decays", nargs="+", type=float, default=[0.0, 0.3])
    parser.add_argument("--compile", action="store_true", help="compile all projects")
    parser.add_argument(
        "--val-tokens", type=int, default=1_000_000, help="maximum number of validation tokens (default: %(default)s)"
    )
    parser.add_argument("--jobs", type=int, default=1, help="number of concurrent runs (default: %(default)s)")
    parser.add_argument("--runs", default="out/peers", help="directory of the results (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    parser.add_argument("--run", help=argparse.SUPPRESS)  # a Run as JSON, to be trained in this process
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        options.result.write_text(json.dumps(work(Run(**json.loads(options.run)))))
        return
    options.dataset = os.path.abspath(options.dataset)
    for name in ("nanochat", "nanogpt"):
        if getattr(options, name):
            setattr(options, name, os.path.abspath(getattr(options, name)))
    projects = [p for p in options.projects if p in ("modern", "gpt2") or getattr(options, p)]
    runs = Runs(options)

    sweep_tokens = options.tokens[min(1, len(options.tokens) - 1)]
    trials = runs.sweep(projects, sweep_tokens)
    best = {p: best_of(trials, p) for p in projects}
    final = [
        runs.make(p, tokens, seed, best[p]["factor"], best[p]["decay"])
        for tokens in options.tokens
        for seed in options.seeds
        for p in projects
    ]
    results = runs.execute_all(final)
    val_tokens = min(options.val_tokens, validation_rows(open_dataset(options.dataset).val, T) * T)

    lines = [
        f"{machine()}; {options.jobs} concurrent runs" + (" with one thread each" if options.jobs > 1 else ""),
        "",
        f"{N_LAYER} layers, {N_HEAD} heads, width {N_EMBD}, T = {T}, {ROWS * T:,} tokens per step; dataset: "
        f"{Path(options.dataset).name}; {val_tokens:,} validation tokens; "
        f"{'compiled' if options.compile else 'not compiled'}.",
        "",
        f"## Learning rates and weight decay: loss at {sweep_tokens:,} tokens, seed {options.seeds[0]}",
        "",
        "| project | factor of all learning rates | factor of the weight decay | validation loss |",
        "|---|---:|---:|---:|",
    ]
    for r in sorted(trials, key=lambda r: projects.index(r["project"])):
        lines.append(f"| {r['project']} | {r['factor']:g} | {r['decay']:g} | {r['loss']:.4f} |")
    lines += [
        "",
        "## Loss by tokens, at the best trial of each project",
        "",
        "| tokens | project | parameters | validation loss, mean (min to max) | seconds, median | ms per step |",
        "|---:|---|---:|---:|---:|---:|",
    ]
    for tokens in options.tokens:
        for p in projects:
            rows = [r for r in results if (r["project"], r["steps"]) == (p, round(tokens / (ROWS * T)))]
            losses = sorted(r["loss"] for r in rows)
            seconds, step_seconds = (statistics.median(r[key] for r in rows) for key in ("seconds", "step_seconds"))
            lines.append(
                f"| {tokens:,} | {p} | {rows[0]['parameters']:,} | {statistics.mean(losses):.4f} ({losses[0]:.4f} to "
                f"{losses[-1]:.4f}) | {seconds:.0f} | {1000 * step_seconds:.0f} |"
            )
    write_table(lines, options.out)


if __name__ == "__main__":
    main()
