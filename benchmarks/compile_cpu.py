"""Time torch.compile on a CPU: compilation with an empty and a filled cache, and the steps before and after.

    python benchmarks/compile_cpu.py DATASET [--out results/speed/compile-cpu.md]

DATASET is a prepared dataset. Each preset trains --steps steps with the model of benchmarks/recipe.py: eager, compiled
with an empty cache, and compiled again with the filled cache, --runs times in turns. The seconds of compilation are
those of all steps minus their number times the median step.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from babygpt.training.log import column, read_log  # noqa: E402
from benchmarks.table import machine, write_table  # noqa: E402

PRESETS = ("gpt2", "modern")
SETTINGS = ("eager", "empty cache", "filled cache")


def train(preset: str, setting: str, dataset: str, steps: int, cache: Path) -> tuple[float, float]:
    """Return the seconds of compilation and the milliseconds of a step."""
    with tempfile.TemporaryDirectory() as directory:
        command = [
            sys.executable, "train.py", preset, "--general.out-dir", directory + "/run", "--general.mode", "train",
            "--general.device", "cpu", "--data.dataset", dataset, "--model.block-size", "256", "--model.n-layer", "4",
            "--model.n-head", "4", "--model.n-embd", "128", "--training.batch-tokens", "4096",
            "--training.micro-batch-size", "16", "--training.max-steps", str(steps), "--training.compile",
            "off" if setting == "eager" else "on", "--saving.every-n-steps", "0", "--logging.every-n-steps", "0",
        ]  # fmt: skip
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache)}
        subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
        step_ms = column(read_log(Path(directory) / "run" / "log.csv"), "step_ms")[1]
    median = statistics.median(step_ms)
    return max(0.0, sum(step_ms) - len(step_ms) * median) / 1000, median


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", metavar="DATASET", help="directory of the prepared dataset")
    parser.add_argument("--steps", type=int, default=20, help="steps of each run (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=3, help="runs of each setting (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    options = parser.parse_args()
    dataset = os.path.abspath(options.dataset)
    results: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for _ in range(options.runs):
        for preset in PRESETS:
            with tempfile.TemporaryDirectory() as cache:
                for setting in SETTINGS:
                    result = train(preset, setting, dataset, options.steps, Path(cache))
                    results.setdefault((preset, setting), []).append(result)
                    print(f"{preset}, {setting}: {result[0]:.1f} s, {result[1]:.0f} ms", file=sys.stderr, flush=True)
    lines = [
        f"`python benchmarks/compile_cpu.py {Path(dataset).name} --steps {options.steps} --runs {options.runs}`, "
        f"{machine()}; {torch.get_num_threads()} threads. 4 layers, width 128, 4,096 tokens per step. Medians.",
        "",
        "| preset | code | seconds of compilation | ms per step | ratio to eager, median of pairs |",
        "|---|---|---:|---:|---:|",
    ]
    for preset in PRESETS:
        eager = results[preset, "eager"]
        for setting in SETTINGS:
            runs = results[preset, setting]
            ratio = statistics.median(run[1] / base[1] for run, base in zip(runs, eager, strict=True))
            compile_seconds, step_ms = (statistics.median(values) for values in zip(*runs, strict=True))
            shown = "" if setting == "eager" else f"{compile_seconds:.0f}"
            lines.append(f"| {preset} | {setting} | {shown} | {step_ms:.0f} | {ratio:.2f} |")
    write_table(lines, options.out)


if __name__ == "__main__":
    main()
