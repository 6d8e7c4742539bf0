"""Train tiny Shakespeare with nanoGPT's script and with ours, and compare the loss over the whole validation part.

    python fineweb.py shakespeare --tokenizer char
    python benchmarks/shakespeare.py --nanogpt PATH [--jobs 2] [--out results/first-hour/shakespeare.md]

PATH is a checkout of nanoGPT. Its train.py runs unchanged in a copy, except for its fixed seed, with the flags of its
README for a CPU. Its final checkpoint is evaluated on all windows of the validation part, one after the other, by
nanoGPT's model and by ours, which reads the checkpoint. The presets shakespeare-char-cpu and shakespeare-modern train
with the same number of steps and tokens. Runs are written to the directory --runs, and finished runs are not repeated.
If --jobs is greater than 1, each run uses one thread.
"""

import argparse
import os
import pickle
import runpy
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from babygpt.data.shards import Dataset, open_dataset  # noqa: E402
from babygpt.training.log import column, read_log  # noqa: E402
from benchmarks.table import machine, map_jobs, write_table  # noqa: E402
from model import GPT  # noqa: E402

SEEDS = (1337, 1338, 1339)
PRESETS = ("shakespeare-char-cpu", "shakespeare-modern")
NANOGPT_FLAGS = (
    "--device=cpu", "--compile=False", "--eval_iters=20", "--log_interval=100", "--block_size=64", "--batch_size=12",
    "--n_layer=4", "--n_head=4", "--n_embd=128", "--max_iters=2000", "--lr_decay_iters=2000", "--dropout=0.0",
)  # fmt: skip


def run(command: list[str], directory: Path, jobs: int) -> float:
    """Run a command and return its time in seconds."""
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if jobs > 1 else {})
    start = time.perf_counter()
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"error: {' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return time.perf_counter() - start


def train_nanogpt(nanogpt: Path, dataset: Dataset, directory: Path, seed: int, jobs: int) -> None:
    """Run nanoGPT's train.py in a copy of the checkout, on our characters, without the end-of-text tokens."""
    shutil.copytree(nanogpt, directory, ignore=shutil.ignore_patterns(".git"))
    script = (directory / "train.py").read_text()
    if script.count("torch.manual_seed(1337 + seed_offset)") != 1:
        sys.exit("error: this checkout of nanoGPT sets its seed in a different way.")
    (directory / "train.py").write_text(script.replace("1337 + seed_offset", f"{seed} + seed_offset"))
    data = directory / "data" / "shakespeare_char"
    for split, tokens in (("train", dataset.train), ("val", dataset.val)):
        tokens.read(1, len(tokens)).astype("<u2").tofile(data / f"{split}.bin")
    (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": dataset.vocab_size - 1}))
    flags = [*NANOGPT_FLAGS, "--always_save_checkpoint=True", "--out_dir=checkpoint"]
    seconds = run([sys.executable, "train.py", "config/train_shakespeare_char.py", *flags], directory, jobs)
    (directory / "seconds").write_text(f"{seconds}")


@torch.no_grad()
def evaluate_nanogpt(directory: Path, dataset: Dataset) -> tuple[float, float]:
    """Return the mean loss of the final checkpoint over all windows of the validation part, in nats per character.

    The first is computed by nanoGPT's model, the second by ours.
    """
    names, path = runpy.run_path(str(directory / "model.py")), directory / "checkpoint" / "ckpt.pt"
    saved = torch.load(path, map_location="cpu", weights_only=True)
    assert saved["iter_num"] == 2000, "the final checkpoint"
    model = names["GPT"](names["GPTConfig"](**saved["model_args"]))
    model.load_state_dict(saved["model"])
    model.eval()
    ids = torch.from_numpy(dataset.val.read(1, len(dataset.val)))
    block_size = model.config.block_size
    count = (len(ids) - 1) // block_size
    rows = torch.stack([ids[i * block_size : (i + 1) * block_size + 1] for i in range(count)])
    shutil.copy(dataset.tokenizer, path.parent)
    ours, sums = GPT.from_pretrained(path), [0.0, 0.0]
    for batch in rows.split(64):
        inputs, targets = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
        sums[0] += model(inputs, targets)[1].item() * len(batch)
        sums[1] += ours(inputs, targets).item() * len(batch)
    return sums[0] / count, sums[1] / count


def train_ours(preset: str, dataset: str, directory: Path, seed: int, jobs: int) -> None:
    command = [
        sys.executable, "train.py", preset, "--dataset", dataset, "--out-dir", str(directory), "--seed", str(seed),
        "--mode", "train", "val", "--device", "cpu",
    ]  # fmt: skip
    seconds = run(command, ROOT, jobs)
    (directory / "seconds").write_text(f"{seconds}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, required=True, help="checkout of nanoGPT")
    parser.add_argument("--dataset", default="data/shakespeare-char", help="dataset (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="number of concurrent runs (default: %(default)s)")
    parser.add_argument("--runs", type=Path, default=Path("out/shakespeare"), help="directory of the runs")
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    options = parser.parse_args()
    dataset, path, runs = open_dataset(options.dataset), os.path.abspath(options.dataset), options.runs.absolute()

    def train(job: tuple[str, int]) -> tuple[float, float, float]:
        """Return the loss of a run, that of its weights in our model, and the time in seconds."""
        name, seed = job
        directory = runs / f"{name}-{seed}"
        if not (directory / "seconds").exists():
            shutil.rmtree(directory, ignore_errors=True)
            if name == "nanoGPT":
                train_nanogpt(options.nanogpt, dataset, directory, seed, options.jobs)
            else:
                train_ours(name, path, directory, seed, options.jobs)
        if name == "nanoGPT":
            loss, ours = evaluate_nanogpt(directory, dataset)
        else:
            loss = ours = column(read_log(directory / "log.csv"), "val_loss")[1][-1]
        print(f"{directory.name}: {loss:.4f}", file=sys.stderr, flush=True)
        return loss, ours, float((directory / "seconds").read_text())

    names = ("nanoGPT", *PRESETS)
    jobs = [(name, seed) for seed in SEEDS for name in names]
    results = dict(zip(jobs, map_jobs(train, jobs, options.jobs), strict=True))
    lines = [
        f"`python benchmarks/shakespeare.py --nanogpt PATH --jobs {options.jobs}`, {machine()}",
        "",
        f"2,000 steps of 768 characters; the loss after the last step over the whole validation part, in nats per "
        f"character; seeds {', '.join(map(str, SEEDS))}. The time is that of the whole command, with periodic "
        "validation and checkpoints.",
        "",
        "| command | validation loss, mean (by seed) | seconds, median |",
        "|---|---:|---:|",
    ]
    differences = {}
    for name in names:
        losses, ours, seconds = zip(*(results[name, seed] for seed in SEEDS), strict=True)
        by_seed = ", ".join(f"{loss:.4f}" for loss in losses)
        command = "nanoGPT's train.py" if name == "nanoGPT" else f"python train.py {name}"
        lines.append(f"| {command} | {statistics.mean(losses):.4f} ({by_seed}) | {statistics.median(seconds):.0f} |")
        differences[name] = max(abs(loss - other) for loss, other in zip(losses, ours, strict=True))
    lines += [
        "",
        f'nanoGPT\'s checkpoints in our model, `GPT.from_pretrained("ckpt.pt")`: the losses differ by at most '
        f"{differences['nanoGPT']:.1e}.",
    ]
    write_table(lines, options.out)


if __name__ == "__main__":
    main()
