"""Check and measure everything on a CUDA GPU, in one command that can be interrupted and repeated.

    bash runs/gpu_report.sh                     # 45 minutes at most
    bash runs/gpu_report.sh --minutes 9         # the most important stages first, what fits
    bash runs/gpu_report.sh --rehearse          # every stage on the CPU, at tiny sizes

Each stage is a process of its own; its result goes to out/gpu-report/<GPU>-<hash of the sources>/<stage>.json, and a
finished stage is not run again. The report is results/gpu/<GPU>.md. Weights and tokens are random, except for the run
with train.py, whose data is Python's standard library, or --dataset.

A share of the ceiling is the rate of floating-point operations (6 per weight and token, attention counted whole)
divided by the rate of a large bfloat16 product on the same GPU.
"""

import argparse
import csv
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_stages as on_gpu
from benchmarks.cases import CASES, MEASURED_ONLY
from benchmarks.gpu_stages import Result, Sizes

ROOT = Path(__file__).parent.parent


def stages(sizes: Sizes, options: argparse.Namespace) -> dict[str, tuple[int, Callable[[], Result]]]:
    """Name to estimated seconds and function, the most important first."""
    steps = {case.name: (130, partial(on_gpu.training_step, sizes, case)) for case in [*CASES, *MEASURED_ONLY]}
    first = dict(list(steps.items())[:3])
    found: dict[str, tuple[int, Callable[[], Result]]] = {
        "gpu": (10, partial(on_gpu.gpu, sizes)),
        "ceilings": (30, partial(on_gpu.ceilings, sizes)),
        "correct gpt2": (60, partial(on_gpu.correct, sizes, "gpt2")),
        **first,
        "correct modern": (60, partial(on_gpu.correct, sizes, "modern")),
        "attention": (30, partial(on_gpu.attention_kernels, sizes)),
        "train.py, killed and resumed": (300, partial(on_gpu.killed_and_resumed, sizes, options)),
        "ranks": (90, partial(on_gpu.ranks_agree, sizes)),
        "profile, gpt2": (60, partial(on_gpu.profile, sizes, CASES[1])),
        "profile, modern": (60, partial(on_gpu.profile, sizes, CASES[2])),
        "deterministic": (90, partial(on_gpu.deterministic, sizes)),
        "other work": (180, partial(on_gpu.other_work, sizes)),
        **{name: stage for name, stage in steps.items() if name not in first},
    }
    if options.nanogpt:
        for kind in ("nanoGPT, bfloat16, compiled", "nanoGPT, bfloat16, eager"):
            found[kind] = (120, partial(on_gpu.nanogpt, options, kind))
    return found


# ---------------------------------------------------------------------------------------------------------
# the report


def cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return ", ".join(map(cell, value)) if isinstance(value, list) else str(value)


def report(results: dict[str, Result], options: argparse.Namespace) -> str:
    """The report as Markdown, predictions next to results."""
    with open(ROOT / "results" / "speed" / "fake-h200.csv", newline="") as file:
        predicted = {row["case"]: row for row in csv.DictReader(file)}
    limits = results.get("ceilings", {})
    product, copy = limits.get("large, TFLOP/s"), limits.get("copy, GB/s")
    steps = {name: result for name, result in results.items() if "tokens/s" in result}
    name = results.get("gpu", {}).get("name", "rehearsal on a CPU: the figures mean nothing")
    lines = [
        f"# {name}", "",
        f"`{' '.join(['bash runs/gpu_report.sh', *options.arguments])}`, {date.today()}, sources {options.revision}.",
        "", "A prediction adds the time of all operations at this GPU's large product and that of the bytes of",
        "[fake-h200](../speed/fake-h200.md) at its copy. Share: FLOP/s divided by those of the large product; the goal",
        "is 0.60. The first step compiles, or finds the code in the cache. A step has 524,288 tokens; nanoGPT's, by",
        "benchmarks/speed.py, has 32,768.", "",
        "| training step | tokens/s | predicted | share of the ceiling | MFU | peak GB | predicted | first step, s |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    for name, step in steps.items():
        flops, prediction, share = step.get("MFLOP per token"), "", ""
        if product and copy and flops:
            share = f"{step['TFLOP/s'] / product:.3f}"
            if name in predicted:
                prediction = cell(
                    1 / (flops * 1e6 / (product * 1e12) + float(predicted[name]["KB per token"]) * 1e3 / (copy * 1e9))
                )
        mfu = f"{step['MFU']:.1%}" if step.get("MFU") else ""
        lines.append(
            f"| {name} | {cell(step['tokens/s'])} | {prediction} | {share} | {mfu} | {cell(step['peak GB'])} | "
            f"{predicted[name]['peak GB'] if name in predicted else ''} | "
            f"{cell(step.get('first step, s', ''))} |"
        )
    for name, result in results.items():
        if name not in steps:
            lines += ["", f"## {name}", "", *(f"- {key}: {cell(value)}" for key, value in result.items())]
    return "\n".join(lines) + "\n"


def revision() -> str:
    """The first characters of a hash over the Python sources: results of other sources are not reused."""
    digest = hashlib.sha256()
    for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("babygpt/**/*.py"), *ROOT.glob("benchmarks/*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:10]


def run_stage(command: list[str], seconds: float) -> str | None:
    """The output of a stage; None if it failed or took longer than `seconds`, with all that it started killed."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    return output if process.returncode == 0 else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--minutes", type=float, default=45, help="stages that would end later are left for the next run"
    )
    parser.add_argument("--nanogpt", help="a checkout of nanoGPT to measure as well")
    parser.add_argument("--dataset", help="prepared data for the run with train.py")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with tiny sizes")
    parser.add_argument("--folder", type=Path, help="directory for the stages' results [out/gpu-report]")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    begin = time.monotonic()
    options = parser.parse_args()
    options.arguments = sys.argv[1:]
    if not options.rehearse and not torch.cuda.is_available():
        sys.exit("error: no CUDA GPU is visible. To try the commands on a CPU: --rehearse.")
    name = "rehearsal" if options.rehearse else torch.cuda.get_device_name(0).replace(" ", "-").lower()
    options.revision = revision()
    options.folder = (options.folder or ROOT / "out" / "gpu-report") / f"{name}-{options.revision}"
    chosen = stages(Sizes(options.rehearse), options)
    if options.stage:
        print(json.dumps(chosen[options.stage][1]()))
        return
    if options.rehearse:
        shutil.rmtree(options.folder, ignore_errors=True)
    options.folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, Result] = {}
    failed = []
    for stage, (seconds, _) in chosen.items():
        file = options.folder / f"{stage.replace(' ', '-').replace(',', '')}.json"
        left = 60 * options.minutes - (time.monotonic() - begin)
        if not file.exists() and left > seconds / 2:
            command = [sys.executable, "-m", "benchmarks.gpu_report", *options.arguments, "--stage", stage]
            print(f"{stage} ...", flush=True)
            try:
                output = run_stage(command, left)
            except subprocess.TimeoutExpired:
                print(f"{stage}: stopped at the time limit; run the same command to continue")
                break
            if output is None:
                failed.append(stage)
                continue
            file.write_text(output.splitlines()[-1])
        if file.exists():
            results[stage] = json.loads(file.read_text())
            print(f"{stage}: " + "; ".join(f"{key} {cell(value)}" for key, value in results[stage].items()), flush=True)
    out = options.folder / "report.md" if options.rehearse else ROOT / "results" / "gpu" / f"{name}.md"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(report(results, options), encoding="utf-8")
    print(f"{len(results)} of {len(chosen)} stages are in {out}")
    if failed:
        sys.exit(f"error: failed stages, see above: {', '.join(failed)}")


if __name__ == "__main__":
    main()
