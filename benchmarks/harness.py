"""Compare tools.evaluate with lm-evaluation-harness on exported models: predictions, losses and time.

    python benchmarks/harness.py out/gpt2 out/modern [--limit 300] [--out results/evaluation/harness.md]

Needs `pip install "lm_eval[hf]"`. Each model is exported and loaded by the harness, which evaluates its own tasks on
the same examples: HellaSwag, ARC-easy, PIQA, SciQ, LAMBADA and BLiMP. Both compute in float32 on the CPU. The seconds
are those of encoding and scoring, without loading the model and reading the data.
"""

import argparse
import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
sys.path = [path for path in sys.path if Path(path) != ROOT / "benchmarks"]

import lm_eval  # noqa: E402
import torch  # noqa: E402
from lm_eval.api.task import ConfigurableTask  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402
from lm_eval.tasks._yaml_loader import load_yaml  # noqa: E402

from babygpt.evaluation import tasks  # noqa: E402
from babygpt.evaluation.packing import Example  # noqa: E402
from babygpt.evaluation.scoring import score_endings  # noqa: E402
from babygpt.export.directory import write_model  # noqa: E402
from babygpt.pretrained import read_pretrained  # noqa: E402
from benchmarks.table import machine, write_table  # noqa: E402
from hellaswag import fetch, load_examples  # noqa: E402
from model import GPT  # noqa: E402

CPU = torch.device("cpu")


def arc_row(row: dict) -> dict:
    question = row["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
    labels = [str(i) for i in range(len(row["choices"]))]
    choices = {"text": row["choices"], "label": labels}
    return {"question": question, "choices": choices, "answerKey": labels[row["gold"]]}


# our task -> that of the harness, and the conversion of our rows to those of its dataset
HARNESS: dict[str, tuple[str, Callable[[dict], dict]]] = {
    "hellaswag": ("hellaswag", dict),
    "arc_easy": ("arc_easy", arc_row),
    "piqa": ("piqa", dict),
    "sciq": ("sciq", dict),
    "lambada": ("lambada_openai", lambda row: {"text": f"{row['query']} {row['answer']}"}),
    "blimp": ("blimp_adjunct_island", dict),  # all paradigms have the same configuration
}


def their_task(name: str, rows: list[dict], directory: Path) -> ConfigurableTask:
    """Return the harness's task with its own configuration, but with local data."""
    theirs, convert = HARNESS[name]
    path = directory / f"{name}.jsonl"
    path.write_text("".join(json.dumps(convert(row)) + "\n" for row in rows))
    config = load_yaml(TaskManager().task_index[theirs].yaml_path)
    config |= {
        "task": name, "dataset_path": "json", "dataset_name": None, "training_split": None, "test_split": None,
        "dataset_kwargs": {"data_files": {"validation": str(path)}}, "validation_split": "validation",
        "fewshot_split": None,
    }  # fmt: skip
    return ConfigurableTask(config=config)


def predictions(losses: list[list[float]], examples: list[Example], greedy: list[bool]) -> list[tuple]:
    """Return what each example predicts by loss and by loss per character, or whether greedy decoding is right."""
    found: list[tuple] = []
    for row, example, is_greedy in zip(losses, examples, greedy, strict=True):
        if len(row) == 1:
            found.append((is_greedy,))
            continue
        means = [loss / length for loss, length in zip(row, example.lengths, strict=True)]
        found.append((row.index(min(row)), means.index(min(means))))
    return found


def compare(name: str, model: GPT, harness: HFLM, rows: list[dict], directory: Path) -> str:
    """Evaluate the rows of a task with both, and return a row of the table."""
    task = their_task(name, rows, directory)
    start = time.perf_counter()
    results = lm_eval.evaluate(harness, {name: task}, bootstrap_iters=0)
    their_seconds = time.perf_counter() - start
    samples = sorted(results["samples"][name], key=lambda sample: sample["doc_id"])
    theirs = [[-float(answer[0][0]) for answer in sample["resps"]] for sample in samples]
    their_greedy = [bool(sample["resps"][0][0][1]) for sample in samples]

    start = time.perf_counter()
    if name == "hellaswag":
        examples = load_examples(fetch(None, "en"), model.tokenizer, "lm-eval", len(rows))
    else:
        examples = [tasks.make_example(*tasks.TASKS[name].render(row), model.tokenizer) for row in rows]  # type: ignore[index]
    scores = score_endings(model, examples, CPU, "float32")
    seconds = time.perf_counter() - start
    counts = [len(example.endings) for example in examples]
    ours = [part.tolist() for part in scores.losses.split(counts)]
    num_tokens = [len(example.endings[0]) for example in examples]
    greedy = [part[0].item() == n for part, n in zip(scores.num_greedy.split(counts), num_tokens, strict=True)]

    pairs = list(zip(predictions(ours, examples, greedy), predictions(theirs, examples, their_greedy), strict=True))
    differing = [i for i, (a, b) in enumerate(pairs) if a != b]
    largest = max(abs(a - b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True))
    for i in differing:
        print(f"{name} {i}: {pairs[i]}, ours {ours[i]}, theirs {theirs[i]}", file=sys.stderr)
    return (
        f"{len(rows) - len(differing):,} of {len(rows):,} | {largest:.1e} | {seconds:.1f} | {their_seconds:.1f} | "
        f"{their_seconds / seconds:.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", metavar="MODEL", nargs="+", help="run, or anything else that sample.py takes")
    parser.add_argument("--tasks", nargs="+", default=list(HARNESS), help="tasks (default: all)")
    parser.add_argument("--limit", type=int, help="use only the first examples of each task (default: all)")
    parser.add_argument("--batch-size", type=int, default=16, help="of the harness (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    lines = [
        f"{machine()}, lm_eval {lm_eval.__version__}, batch size {options.batch_size}",
        "",
        "| model | task | equal predictions | largest difference of losses | seconds | harness | ratio |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for spec in options.models:
        model = GPT.from_pretrained(spec)
        with tempfile.TemporaryDirectory() as temporary:
            directory = Path(temporary)
            write_model(read_pretrained(spec), directory)
            harness = HFLM(str(directory), device="cpu", dtype="float32", batch_size=options.batch_size,
                           trust_remote_code=True)  # fmt: skip
            for name in options.tasks:
                path = fetch(None, "en") if name == "hellaswag" else tasks.fetch(name)
                rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()][: options.limit]
                lines.append(f"| {spec} | {name} | {compare(name, model, harness, rows, directory)} |")
                print(lines[-1], file=sys.stderr, flush=True)
    write_table(lines, options.out)


if __name__ == "__main__":
    main()
