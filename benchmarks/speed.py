"""How fast a training step, sampling and HellaSwag are: ours beside what a user would pick instead, in one run.

    python benchmarks/speed.py --nanogpt PATH [--stages step sample hellaswag muon] [--out results/speed/cpu.md]
    python benchmarks/speed.py --only gpt2 --against OLD --stages step    # OLD: another checkout of BabyGPT

--nanogpt is a checkout of nanoGPT, whose model.py is imported. Every way is a process of its own; the ways take turns.
All weights are random. On a CPU the step is that of a small model (4 layers, 4 heads, 256 wide, T = 256, batch 8), on
CUDA of GPT-2's smallest (T = 1,024); sampling and HellaSwag are always of GPT-2's smallest:

    step       forward, backward, clipping and AdamW; ours by train.train_step
    sample     32 tokens of prompt, 128 new ones, for 1 and for 8 texts at once
    hellaswag  --examples of --hellaswag FILE (questions in its format are made up without); build-nanogpt's way is one
               example at a time, four padded rows, all logits; picks are compared
    muon       one update by Muon of 6 layers, 384 wide, on 1, 2 and 4 ranks of gloo with a thread each (CPU)
"""

import argparse
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from babygpt.data.tokenizer import load_tokenizer  # noqa: E402
from babygpt.errors import exit_now  # noqa: E402
from babygpt.evaluation.packing import Example  # noqa: E402
from babygpt.nn.generation import SamplingParams, generate  # noqa: E402
from babygpt.training.device import autocast, peak_flops, peak_memory_mib, uses_bfloat16  # noqa: E402
from babygpt.training.distributed import Ranks  # noqa: E402
from babygpt.training.guard import UpdateGuard  # noqa: E402
from babygpt.training.optim import (  # noqa: E402
    make_optimizers,
    muon,
    set_learning_rates,
)
from babygpt.training.schedule import LRSchedule  # noqa: E402
from benchmarks.table import write_table  # noqa: E402
from dataloader import Batch, Position  # noqa: E402
from hellaswag import load_examples, losses, predictions  # noqa: E402
from model import GPT, GPTConfig, build_model  # noqa: E402
from train import TrainState, next_token_loss, train_step  # noqa: E402
from train_config import Config, preset, variant  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if CUDA else torch.device("cpu")
SMALL: dict[str, object] = {"n_layer": 4, "n_head": 4, "n_embd": 256, "block_size": 256, "vocab_size": 50257}
PROMPT, NEW = 32, 128


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def timed(call: Callable[[], object], times: int, warm_up: int) -> dict:
    """Milliseconds of the first call and the median of later ones."""
    spent = []
    for _ in range(1 + warm_up + times):
        begin = time.perf_counter()
        call()
        synchronize()
        spent.append((time.perf_counter() - begin) * 1e3)
    return {"first_ms": spent[0], "ms": statistics.median(spent[1 + warm_up :] or spent)}


# ---------------------------------------------------------------------------------------------------------
# a training step


def step_settings(name: str, dtype: str) -> Config:
    config = variant(preset(name), model={"vocab_size": 50257}, training={"dtype": dtype})
    if CUDA:
        return variant(config, training={"micro_batch_size": 32, "batch_tokens": 32 * 1024})
    return variant(config, model=SMALL, training={"micro_batch_size": 8, "batch_tokens": 8 * 256})


def step_ours(name: str, dtype: str, compiled: bool) -> dict:
    config, ranks = step_settings(name, dtype), Ranks(0, 0, 1, DEVICE)
    training = config.training
    torch.manual_seed(0)
    raw_model = build_model(config.model).to(DEVICE)
    optimizers = make_optimizers(raw_model, asdict(config.optimizer))
    model: torch.nn.Module = raw_model
    if compiled:
        model = cast(torch.nn.Module, torch.compile(raw_model, dynamic=False))  # typed as returning a function
    rows = torch.randint(0, 50257, (training.micro_batch_size, config.model.block_size + 1))
    rows = rows.pin_memory() if CUDA else rows
    state = TrainState(model, optimizers, UpdateGuard(DEVICE), ranks, dtype, config.optimizer.grad_clip)
    set_learning_rates(optimizers, LRSchedule(100, min_lr_ratio=0.1), 1)

    def step() -> None:
        train_step(state, Batch(Position(), Position(), [rows], training.batch_tokens), next_token_loss, seed=0)

    found = timed(step, 20, 3)
    rate = training.batch_tokens / found["ms"] * 1e3
    peak = peak_flops(DEVICE)
    return found | {
        "tokens_per_s": rate,
        "mfu": rate * raw_model.flops_per_token() / peak if peak and uses_bfloat16(DEVICE, dtype) else None,
    }


def step_nanogpt(bfloat16: bool, compiled: bool) -> dict:
    from model_of_nanogpt import GPT as Theirs
    from model_of_nanogpt import GPTConfig as TheirConfig

    config = step_settings("gpt2", "auto")
    m, (B, T) = config.model, (config.training.micro_batch_size, config.model.block_size)
    torch.manual_seed(0)
    raw_model = Theirs(
        TheirConfig(block_size=T, vocab_size=50304, n_layer=m.n_layer, n_head=m.n_head, n_embd=m.n_embd, bias=True)
    ).to(DEVICE)
    optimizer = raw_model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), DEVICE.type)
    model = torch.compile(raw_model) if compiled else raw_model
    rows = torch.randint(0, 50257, (B, T + 1))
    rows = rows.pin_memory() if CUDA else rows

    def step() -> None:
        x, y = (part.contiguous().to(DEVICE, non_blocking=True) for part in (rows[:, :-1], rows[:, 1:]))
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=bfloat16):
            _, loss = model(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(raw_model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    found = timed(step, 20, 3)
    return found | {"tokens_per_s": B * T / found["ms"] * 1e3, "mfu": None}


# ---------------------------------------------------------------------------------------------------------
# sampling


def gpt2() -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig()).to(DEVICE).eval()


def prompt(texts: int) -> torch.Tensor:
    return torch.randint(0, 50257, (texts, PROMPT), generator=torch.Generator().manual_seed(1)).to(DEVICE)


def sampled(call: Callable[[], object], texts: int, times: int) -> dict:
    found = timed(call, times, 0)
    return {"first_ms": found["first_ms"], "ms": found["ms"] / NEW, "tokens_per_s": texts * NEW / found["ms"] * 1e3}


def sample_ours(texts: int, dtype: str, compiled: bool = False) -> dict:
    model, prompts = gpt2(), prompt(texts).tolist()
    params = SamplingParams(NEW, top_k=50, compile=compiled)

    def write() -> None:
        with autocast(DEVICE, dtype):
            for _ in generate(model, prompts, params):
                pass

    return sampled(write, texts, 3)


@torch.no_grad()
def sample_nanogpt(texts: int, dtype: str) -> dict:
    from model_of_nanogpt import GPT as Theirs
    from model_of_nanogpt import GPTConfig as TheirConfig

    model, idx = Theirs(TheirConfig(vocab_size=50304, bias=True)).to(DEVICE).eval(), prompt(texts)

    def write() -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            model.generate(idx, NEW, 1.0, 50)

    return sampled(write, texts, 0)  # minutes: nothing to warm up


@torch.no_grad()
def sample_transformers(texts: int, dtype: str) -> dict:
    from transformers import GPT2Config, GPT2LMHeadModel

    model: Any = GPT2LMHeadModel(GPT2Config())  # mypy rejects calls of its to() and generate()
    model.to(DEVICE, getattr(torch, dtype)).eval()
    idx = prompt(texts)
    settings = {"do_sample": True, "top_k": 50, "use_cache": True, "min_new_tokens": NEW, "max_new_tokens": NEW}

    def write() -> None:
        model.generate(idx, attention_mask=torch.ones_like(idx), pad_token_id=50256, **settings)

    return sampled(write, texts, 3)


# ---------------------------------------------------------------------------------------------------------
# HellaSwag


def questions(path: str | None, count: int) -> list[Example]:
    """The first questions of a file, or made up ones of the lengths that HellaSwag's have."""
    if path:
        return load_examples(Path(path), load_tokenizer("gpt2"), "karpathy", count)
    rng = random.Random(0)

    def tokens(low: int, high: int) -> list[int]:
        return [rng.randrange(50257) for _ in range(rng.randint(low, high))]

    examples = []
    for _ in range(count):
        endings = [tokens(8, 40) for _ in range(4)]
        examples.append(Example(tokens(20, 110), endings, 0, [len(ending) for ending in endings]))
    return examples


def score(call: Callable[[GPT, list[Example]], torch.Tensor], dtype: str, options: argparse.Namespace) -> dict:
    model, examples = gpt2(), questions(options.hellaswag, options.examples)
    with torch.no_grad(), autocast(DEVICE, dtype):
        call(model, examples[:16])
        synchronize()
        begin = time.perf_counter()
        sums = call(model, examples)
        synchronize()
        ms = (time.perf_counter() - begin) * 1e3 / len(examples)
    return {"first_ms": None, "ms": ms, "tokens_per_s": None, "picks": predictions(sums, examples)}


def hellaswag_ours(dtype: str, options: argparse.Namespace) -> dict:
    return score(lambda model, examples: losses(model, examples, DEVICE, dtype, options.batch_size), dtype, options)


def hellaswag_one_by_one(dtype: str, options: argparse.Namespace) -> dict:
    def four_rows(model: GPT, examples: list[Example]) -> torch.Tensor:
        sums = []
        for example in examples:
            rows = [example.context + ending for ending in example.endings]
            tokens = torch.zeros(4, max(map(len, rows)), dtype=torch.int64)
            mask = torch.zeros_like(tokens)
            for i, row in enumerate(rows):
                tokens[i, : len(row)] = torch.tensor(row)
                mask[i, len(example.context) : len(row)] = 1
            tokens, mask = tokens.to(DEVICE), mask.to(DEVICE)
            logits = model(tokens)[:, :-1].float()
            token_losses = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
            sums.append((token_losses.view(4, -1) * mask[:, 1:]).sum(dim=1))
        return torch.stack(sums).cpu().double()

    return score(four_rows, dtype, options)


# ---------------------------------------------------------------------------------------------------------
# Muon on several ranks


def muon_rank(rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    torch.manual_seed(0)
    config = replace(preset("modern").model, n_layer=6, n_head=6, n_embd=384, vocab_size=256)
    model = build_model(config)
    (optimizer, _) = muon(model, 0.04, 0.6, 0.008, 0.04)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    found = timed(optimizer.step, 5, 1)
    if rank == 0:
        Path(folder, "found").write_text(json.dumps(found))
    if world_size > 1:
        dist.barrier()  # all leave together: gloo aborts a rank whose peers hang up on it
        dist.destroy_process_group()
        exit_now(0)


def muon_step(world_size: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(muon_rank, (world_size, folder), world_size)
        return json.loads(Path(folder, "found").read_text()) | {"tokens_per_s": None}


# ---------------------------------------------------------------------------------------------------------
# measuring

Way = Callable[[], dict[str, Any]]


def ways(options: argparse.Namespace) -> dict[str, dict[str, Way]]:
    """The ways of each stage by name; the first of a stage is what the others are held against."""
    theirs = bool(options.nanogpt)
    both = "bfloat16" if uses_bfloat16(DEVICE, "auto") else "float32"
    steps: dict[str, Way] = {
        "nanoGPT, float32, eager": partial(step_nanogpt, False, False),
        "nanoGPT, bfloat16, eager": partial(step_nanogpt, True, False),
        "nanoGPT, bfloat16, compiled": partial(step_nanogpt, True, True),
        "gpt2, float32": partial(step_ours, "gpt2", "float32", False),
        f"gpt2, {both}": partial(step_ours, "gpt2", "auto", False),
        f"modern, {both}": partial(step_ours, "modern", "auto", False),
    }
    if CUDA:
        steps |= {
            f"gpt2, {both}, compiled": partial(step_ours, "gpt2", "auto", True),
            f"modern, {both}, compiled": partial(step_ours, "modern", "auto", True),
        }
    samples: dict[str, Way] = {}
    for texts in (1, 8):
        for dtype in dict.fromkeys(("float32", both)):
            samples |= {
                f"nanoGPT, {texts} texts, {dtype}": partial(sample_nanogpt, texts, dtype),
                f"transformers, {texts} texts, {dtype}": partial(sample_transformers, texts, dtype),
                f"ours, {texts} texts, {dtype}": partial(sample_ours, texts, dtype),
            }
            if CUDA:
                samples[f"ours, {texts} texts, {dtype}, compiled"] = partial(sample_ours, texts, dtype, True)
    scores: dict[str, Way] = {}
    for dtype in dict.fromkeys(("float32", both)):
        scores[f"build-nanogpt's way, {dtype}"] = partial(hellaswag_one_by_one, dtype, options)
        scores[f"ours, {dtype}"] = partial(hellaswag_ours, dtype, options)
    muons: dict[str, Way] = {f"{world_size} ranks": partial(muon_step, world_size) for world_size in (1, 2, 4)}
    found = {"step": steps, "sample": samples, "hellaswag": scores, "muon": muons}
    return {
        stage: {name: way for name, way in of.items() if theirs or not name.startswith("nanoGPT")}
        for stage, of in found.items()
    }


def measure(stage: str, name: str, options: argparse.Namespace, root: Path = ROOT) -> dict:
    """Run one way in a process of its own, by the benchmarks/speed.py of the checkout `root`."""
    command = [sys.executable, "benchmarks/speed.py", "--threads", str(options.threads)]
    command += ["--examples", str(options.examples), "--batch-size", str(options.batch_size), "--way", stage, name]
    for flag, path in (("--nanogpt", options.nanogpt), ("--hellaswag", options.hellaswag)):
        command += [flag, str(Path(path).resolve())] if path else []
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: {name} failed in {root}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def only(stage: str, name: str, options: argparse.Namespace) -> None:
    """What such a process does."""
    if options.nanogpt:
        import importlib.util

        path = Path(options.nanogpt) / "model.py"
        spec = importlib.util.spec_from_file_location("model_of_nanogpt", path)
        if spec is None or spec.loader is None:
            sys.exit(f"error: {path} can't be imported.")
        sys.modules["model_of_nanogpt"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    torch.set_num_threads(options.threads)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    found = ways(options)[stage][name]()
    found["memory_mib"] = peak_memory_mib(DEVICE) - (0 if CUDA else before)  # without Python and its libraries
    print(json.dumps(found))


def table(stage: str, found: dict[str, list[dict]]) -> list[str]:
    base = next(iter(found.values()))
    lines = [
        "",
        f"## {stage}",
        "",
        "| way | ms, median (min to max) | tokens/s | times the first | MFU | first call, s | peak memory, MiB |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, runs in found.items():
        ms, times = [run["ms"] for run in runs], [a["ms"] / b["ms"] for a, b in zip(base, runs, strict=True)]
        cell = {
            key: statistics.median(run[key] for run in runs) if runs[0].get(key) is not None else None
            for key in ("tokens_per_s", "mfu", "first_ms", "memory_mib")
        }
        rate = f"{cell['tokens_per_s']:,.0f}" if cell["tokens_per_s"] else ""
        mfu = f"{cell['mfu']:.1%}" if cell["mfu"] else ""
        first = f"{cell['first_ms'] / 1e3:.2f}" if cell["first_ms"] else ""
        lines.append(
            f"| {name} | {statistics.median(ms):,.1f} ({min(ms):,.1f} to {max(ms):,.1f}) | {rate} | "
            f"{statistics.median(times):.2f} | {mfu} | {first} | {cell['memory_mib']:,.0f} |"
        )
    if stage == "hellaswag":
        same = [
            f"{name}: {sum(a == b for a, b in zip(runs[0]['picks'][k], base[0]['picks'][k], strict=True)):,} of "
            f"{len(runs[0]['picks'][k]):,} picks by {what} are those of {next(iter(found))}"
            for name, runs in list(found.items())[1:]
            for k, what in enumerate(("sum", "mean"))
        ]
        lines += ["", *(f"- {line}" for line in same)]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", help="a checkout of nanoGPT")
    parser.add_argument("--stages", nargs="+", default=["step", "sample", "hellaswag"])
    parser.add_argument("--only", default="", help="of a stage only the ways whose name holds this")
    parser.add_argument("--against", type=Path, help="another checkout of BabyGPT, measured in turns with this one")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--hellaswag", help="a file in HellaSwag's format")
    parser.add_argument("--examples", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=16 if CUDA else 4, help="packed rows at once")
    parser.add_argument("--out", type=Path, help="a Markdown file for the tables")
    parser.add_argument("--way", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        stage, name = options.way
        return only(stage, name, options)

    hardware = torch.cuda.get_device_name() if CUDA else f"{options.threads} cores, {platform.machine()}"
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    lines = [
        f"{date.today()}, {hardware}, Python {platform.python_version()}, {versions}; {options.runs} runs in turns"
    ]
    for stage in options.stages:
        chosen = [name for name in ways(options)[stage] if options.only in name]
        if not chosen:
            sys.exit(
                f"error: no way of {stage} contains {options.only!r}. Use a part of: {'; '.join(ways(options)[stage])}"
            )
        measured = {name: (name, ROOT) for name in chosen}
        if options.against:  # before and after, one after the other
            sides = {f" ({options.against})": options.against, "": ROOT}
            measured = {name + side: (name, root) for name in chosen for side, root in sides.items()}
        found: dict[str, list[dict]] = {label: [] for label in measured}
        for _ in range(options.runs):
            for label, (name, root) in measured.items():
                found[label].append(measure(stage, name, options, root))
                print(f"{stage}, {label}: {found[label][-1]['ms']:,.1f} ms", file=sys.stderr, flush=True)
        lines += table(stage, found)
    write_table(lines, options.out)


if __name__ == "__main__":
    main()
