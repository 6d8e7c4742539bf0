"""Measure SFT and DPO of a small model on `test`, with settings that are chosen on `val`.

    python benchmarks/finetune.py out/demo instructions.jsonl preferences.jsonl [--also ultrafeedback.jsonl]

SFT is tried with each learning rate and number of rows per step, and the best setting is that with the lowest response
loss on `val`. DPO starts from its result and is tried with each learning rate. The best one has the highest preference
accuracy on `val` among those whose SFT loss is at most MAX_INCREASE higher than before. Both are then run with
each seed and evaluated on `test`. With --also, DPO with these settings is trained on further preferences, too. All
other settings are the defaults of finetune.py. Runs are written to the directory --runs, and finished runs are not
repeated. Use a new directory if the code, the model or the data has changed.
"""

import argparse
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from babygpt.training.log import column, read_log  # noqa: E402
from benchmarks.table import machine, write_table  # noqa: E402

SEEDS = (1337, 1338, 1339)
SFT_SETTINGS = [(rate, rows) for rows in (8, 4) for rate in (3e-4, 1e-3, 3e-3)]
DPO_RATES = (5e-6, 2e-5, 5e-5)
MAX_INCREASE = 0.15  # of the SFT loss, in nats per token


def run(*arguments: object) -> str:
    """Run Python with these arguments and return what it prints."""
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: {' '.join(map(str, arguments))} failed:\n{done.stderr[-3000:]}")
    return done.stdout


def finetune(method: str, model: Path, data: Path, out: Path, *flags: object) -> Path:
    """Train a run in `out` unless it has finished, and return `out`."""
    if not (out / "finished").exists():
        shutil.rmtree(out, ignore_errors=True)  # left by an interrupted benchmark
        run(ROOT / "finetune.py", method, model, data, "--out-dir", out, "--device", "cpu", *flags)
    return out


def first_and_last(out: Path, name: str) -> tuple[float, float]:
    """Return the first and the last logged value of a column."""
    values = column(read_log(out / "log.csv"), name)[1]
    return values[0], values[-1]


def evaluate(model: Path, data: Path, *flags: object) -> dict[str, tuple[float, str]]:
    """Return what tools.evaluate_chat prints about `test`, by name: the number, and the text that follows it."""
    text = run("-m", "tools.evaluate_chat", model, data, "--device", "cpu", *flags)
    rows = re.findall(
        r"^(response loss|preference accuracy|baseline of \S+: preference accuracy) (\S+)(.*)$", text, re.M
    )
    return {name: (float(value), rest.strip(" ,")) for name, value, rest in rows}


def summarize(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL", help="run directory of a base model")
    parser.add_argument("instructions", type=Path, metavar="INSTRUCTIONS", help="records for SFT")
    parser.add_argument("preferences", type=Path, metavar="PREFERENCES", help="records for DPO")
    parser.add_argument("--also", type=Path, metavar="PREFERENCES", help="further records for DPO")
    parser.add_argument("--runs", type=Path, default=Path("out/finetune"), help="directory of the runs")
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    options = parser.parse_args()
    runs = options.runs
    lines = [f"`python benchmarks/finetune.py {' '.join(sys.argv[1:])}`, {machine()}", ""]

    lines += [
        "| SFT: peak learning rate | rows per step | steps | loss on val before | after |",
        "|---:|---:|---:|---:|---:|",
    ]
    losses = {}
    for rate, rows in SFT_SETTINGS:
        flags = ("--max-lr", rate, "--rows", rows, "--seed", SEEDS[0])
        out = finetune("sft", options.model, options.instructions, runs / f"sft-{rate:g}-{rows}-{SEEDS[0]}", *flags)
        before, losses[rate, rows] = first_and_last(out, "val_loss")
        steps = read_log(out / "log.csv")[-1]["step"]
        lines.append(f"| {rate:g} | {rows} | {steps} | {before:.3f} | {losses[rate, rows]:.3f} |")
        print(lines[-1], file=sys.stderr, flush=True)
    rate, rows = min(losses, key=lambda setting: losses[setting])

    def sft(seed: int) -> Path:
        flags = ("--max-lr", rate, "--rows", rows, "--seed", seed)
        return finetune("sft", options.model, options.instructions, runs / f"sft-{rate:g}-{rows}-{seed}", *flags)

    def dpo(seed: int, dpo_rate: float, data: Path) -> Path:
        out = runs / f"dpo-{data.name.split('.')[0]}-{dpo_rate:g}-{seed}"
        return finetune("dpo", sft(seed), data, out, "--max-lr", dpo_rate, "--seed", seed)

    lines += [
        "",
        "| DPO: peak learning rate | accuracy on val | SFT loss on val before | after |",
        "|---:|---:|---:|---:|",
    ]
    accuracies = {}
    for dpo_rate in DPO_RATES:
        out = dpo(SEEDS[0], dpo_rate, options.preferences)
        before, after = first_and_last(out, "val_sft_loss")
        accuracy = first_and_last(out, "val_accuracy")[1]
        if after <= before + MAX_INCREASE:
            accuracies[dpo_rate] = accuracy
        lines.append(f"| {dpo_rate:g} | {accuracy:.3f} | {before:.3f} | {after:.3f} |")
        print(lines[-1], file=sys.stderr, flush=True)
    if not accuracies:
        sys.exit(f"error: with each learning rate of DPO, the SFT loss increases by more than {MAX_INCREASE}.")
    dpo_rate = max(accuracies, key=lambda tried: accuracies[tried])

    lines += [
        "",
        f"On `test`, for SFT with a learning rate of {rate:g} and {rows} rows per step, and DPO with {dpo_rate:g}; "
        f"mean of the seeds {', '.join(map(str, SEEDS))} (minimum to maximum):",
        "",
        "| measure | before | after |",
        "|---|---:|---:|",
    ]
    base = evaluate(options.model, options.instructions)["response loss"]
    tuned = [evaluate(sft(seed), options.instructions)["response loss"][0] for seed in SEEDS]
    lines.append(f"| SFT: response loss, nats per token {base[1]} | {base[0]:.3f} | {summarize(tuned)} |")
    for data in filter(None, (options.preferences, options.also)):
        before_, after_ = [], []
        for seed in SEEDS:
            before_.append(evaluate(sft(seed), data))
            after_.append(evaluate(dpo(seed, dpo_rate, data), data, "--reference", sft(seed)))
        name = "preference accuracy"
        count = before_[0][name][1].split("(")[1].split(")")[0]
        titles = {
            "response loss": "response loss of the chosen answers",
            name: f"preference accuracy ({count}); after DPO, relative to the model before",
        }
        for key, title in titles.items():
            columns = (summarize([scores[key][0] for scores in found]) for found in (before_, after_))
            lines.append(f"| DPO on {data.name}: {title} | {' | '.join(columns)} |")
        for key, (value, rest) in after_[0].items():
            if key.startswith("baseline"):
                lines.append(f"| {key.split(':')[0]}, without a model ({rest.split('(')[1]} | | {value:.3f} |")
    write_table(lines, options.out)


if __name__ == "__main__":
    main()
