"""Run all checks and benchmarks on a CUDA GPU. An interrupted report continues when the command is run again.

    bash runs/gpu_report.sh                     # all stages, at most 45 minutes
    bash runs/gpu_report.sh --minutes 9         # as many stages as fit, the most important first
    bash runs/gpu_report.sh --rehearse          # all stages on the CPU, with tiny sizes

Each stage runs in a new process and writes out/gpu-report/<GPU>-<hash of the sources>/<stage>.json. Finished stages are
not repeated. The report is written to results/gpu/<GPU>.md. Weights and tokens are random, except in the run with
train.py, which uses Python's standard library or --dataset.

The fraction of matmul peak is the FLOP/s of a training step divided by the FLOP/s of a large bfloat16 matmul on the
same GPU. A step counts 6 FLOPs per weight and token, plus attention without a discount for the causal mask.
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

from benchmarks import gpu_stages
from benchmarks.cases import CASES, MEASURED_ONLY
from benchmarks.gpu_stages import Result, Sizes

ROOT = Path(__file__).parent.parent


def make_stages(sizes: Sizes, options: argparse.Namespace) -> dict[str, tuple[int, Callable[[], Result]]]:
    """Return the estimated seconds and the function of each stage by name, the most important stages first."""
    steps = {
        case.name: (130, partial(gpu_stages.measure_training_step, sizes, case)) for case in [*CASES, *MEASURED_ONLY]
    }
    first = dict(list(steps.items())[:3])
    stages: dict[str, tuple[int, Callable[[], Result]]] = {
        "gpu": (10, partial(gpu_stages.describe_gpu, sizes)),
        "peak rates": (30, partial(gpu_stages.measure_peak_rates, sizes)),
        "compiled and eager, gpt2": (60, partial(gpu_stages.compare_with_eager, sizes, "gpt2")),
        **first,
        "compiled and eager, modern": (60, partial(gpu_stages.compare_with_eager, sizes, "modern")),
        "attention": (30, partial(gpu_stages.measure_attention, sizes)),
        "train.py, killed and resumed": (300, partial(gpu_stages.kill_and_resume, sizes, options)),
        "ranks": (90, partial(gpu_stages.compare_ranks, sizes)),
        "profile, gpt2": (60, partial(gpu_stages.profile_step, sizes, CASES[1])),
        "profile, modern": (60, partial(gpu_stages.profile_step, sizes, CASES[2])),
        "deterministic": (90, partial(gpu_stages.check_determinism, sizes)),
        "periodic tasks": (180, partial(gpu_stages.measure_periodic_tasks, sizes)),
        **{name: stage for name, stage in steps.items() if name not in first},
    }
    if options.nanogpt:
        for name in ("nanoGPT, bfloat16, compiled", "nanoGPT, bfloat16, eager"):
            stages[name] = (120, partial(gpu_stages.measure_nanogpt, options, name))
    return stages


# ---------------------------------------------------------------------------------------------------------
# report


def format_value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return ", ".join(map(format_value, value)) if isinstance(value, list) else str(value)


def format_report(results: dict[str, Result], options: argparse.Namespace) -> str:
    """Return the report as Markdown, with predictions next to measurements."""
    with open(ROOT / "results" / "speed" / "fake-h200.csv", newline="") as file:
        predicted = {row["case"]: row for row in csv.DictReader(file)}
    peaks = results.get("peak rates", {})
    matmul_peak, copy_peak = peaks.get("large, TFLOP/s"), peaks.get("copy, GB/s")
    steps = {name: result for name, result in results.items() if "tokens/s" in result}
    name = results.get("gpu", {}).get("name", "Rehearsal on a CPU: the figures mean nothing")
    lines = [
        f"# {name}", "",
        f"`{' '.join(['bash runs/gpu_report.sh', *options.arguments])}`, {date.today()}, sources {options.revision}.",
        "", "The predicted time is the compute time at the measured matmul peak plus the time of the memory traffic in",
        "[fake-h200](../speed/fake-h200.md) at the measured copy rate. The goal for the fraction of matmul peak is",
        "0.60. The first step compiles the model or loads the code from the cache. A step has 524,288 tokens; the step",
        "of nanoGPT, by benchmarks/speed.py, has 32,768.", "",
        "| training step | tokens/s | predicted | fraction of matmul peak | MFU | peak GB | predicted GB "
        "| first step, s |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    for name, step in steps.items():
        flops, prediction, fraction = step.get("MFLOP per token"), "", ""
        if matmul_peak and copy_peak and flops:
            fraction = f"{step['TFLOP/s'] / matmul_peak:.3f}"
            if name in predicted:
                compute_seconds = flops * 1e6 / (matmul_peak * 1e12)  # seconds per token
                traffic_seconds = float(predicted[name]["KB per token"]) * 1e3 / (copy_peak * 1e9)
                prediction = format_value(1 / (compute_seconds + traffic_seconds))
        mfu = f"{step['MFU']:.1%}" if step.get("MFU") else ""
        lines.append(
            f"| {name} | {format_value(step['tokens/s'])} | {prediction} | {fraction} | {mfu} "
            f"| {format_value(step['peak GB'])} | {predicted[name]['peak GB'] if name in predicted else ''} | "
            f"{format_value(step.get('first step, s', ''))} |"
        )
    for name, result in results.items():
        if name not in steps:
            lines += ["", f"## {name}", "", *(f"- {key}: {format_value(value)}" for key, value in result.items())]
    return "\n".join(lines) + "\n"


def revision() -> str:
    """Return a hash of the Python sources. Results of other sources are not reused."""
    digest = hashlib.sha256()
    for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("babygpt/**/*.py"), *ROOT.glob("benchmarks/*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:10]


def run_stage(command: list[str], seconds: float) -> str | None:
    """Return the standard output of a stage, or None if it failed. After `seconds`, kill its processes and raise."""
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
        "--minutes", type=float, default=45, help="time limit; the next run continues (default: %(default)s)"
    )
    parser.add_argument("--nanogpt", help="path of a nanoGPT checkout to measure as well")
    parser.add_argument("--dataset", help="prepared dataset for the run with train.py")
    parser.add_argument("--rehearse", action="store_true", help="run all stages on the CPU, with tiny sizes")
    parser.add_argument("--folder", type=Path, help="directory of the stages' results (default: out/gpu-report)")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    start = time.monotonic()
    options = parser.parse_args()
    options.arguments = sys.argv[1:]
    if not options.rehearse and not torch.cuda.is_available():
        sys.exit("error: PyTorch finds no CUDA GPU. Use --rehearse to run the stages on the CPU.")
    name = "rehearsal" if options.rehearse else torch.cuda.get_device_name(0).replace(" ", "-").lower()
    options.revision = revision()
    options.folder = (options.folder or ROOT / "out" / "gpu-report") / f"{name}-{options.revision}"
    stages = make_stages(Sizes(options.rehearse), options)
    if options.stage:
        print(json.dumps(stages[options.stage][1]()))
        return
    if options.rehearse:
        shutil.rmtree(options.folder, ignore_errors=True)
    options.folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, Result] = {}
    failed = []
    for stage, (seconds, _) in stages.items():
        file = options.folder / f"{stage.replace(' ', '-').replace(',', '')}.json"
        seconds_left = 60 * options.minutes - (time.monotonic() - start)
        if not file.exists() and seconds_left > seconds / 2:
            command = [sys.executable, "-m", "benchmarks.gpu_report", *options.arguments, "--stage", stage]
            print(f"{stage} ...", flush=True)
            try:
                output = run_stage(command, seconds_left)
            except subprocess.TimeoutExpired:
                print(f"{stage}: stopped at the time limit. Run the same command again to continue.")
                break
            if output is None:
                failed.append(stage)
                continue
            file.write_text(output.splitlines()[-1])
        if file.exists():
            results[stage] = json.loads(file.read_text())
            print(
                f"{stage}: " + "; ".join(f"{key} {format_value(value)}" for key, value in results[stage].items()),
                flush=True,
            )
    out = options.folder / "report.md" if options.rehearse else ROOT / "results" / "gpu" / f"{name}.md"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(format_report(results, options), encoding="utf-8")
    print(f"Wrote {out}: {len(results)} of {len(stages)} stages")
    if failed:
        sys.exit(f"error: These stages failed, see their output above: {', '.join(failed)}")


if __name__ == "__main__":
    main()
