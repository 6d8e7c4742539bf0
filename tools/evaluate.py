"""Evaluate models on several tasks, scored as in lm-evaluation-harness.

    python -m tools.evaluate out/gpt2
    python -m tools.evaluate out/gpt2 out/modern gpt2 --tasks hellaswag lambada piqa --json scores.json
    torchrun --standalone --nproc_per_node=8 -m tools.evaluate out/gpt2

hellaswag, arc_easy, piqa and sciq report `acc`, the accuracy of the answer with the lowest loss, and `acc_norm`, that
of the answer with the lowest loss per character. lambada reports `acc`, the accuracy of greedy decoding, and
`perplexity` of the last word; blimp reports `acc`. babygpt/evaluation/tasks.py describes the data.
"""

import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, get_args

from tyro.conf import Positional

from babygpt import files
from babygpt.console import console
from babygpt.constraints import Positive, metavar, parse_arguments, required
from babygpt.errors import UserError, run
from babygpt.evaluation import tasks
from babygpt.evaluation.packing import Example
from babygpt.evaluation.tasks import Metric, TaskName, TaskScore
from babygpt.training.distributed import Ranks, process_group
from hellaswag import fetch_examples
from model import GPT

# accuracies of OpenAI's GPT-2 124M that others report: nanochat's measurements
PUBLISHED = {
    ("hellaswag", "acc_norm"): 0.309, ("lambada", "acc"): 0.323, ("piqa", "acc_norm"): 0.623,
    ("arc_easy", "acc_norm"): 0.412,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class EvaluateArgs:
    """The command line: each field is a flag, and its comment is the help."""

    # run directories (out/NAME), checkpoints, exported models, or GPT-2 on the Hugging Face Hub: gpt2, gpt2-medium, ...
    models: Annotated[Positional[tuple[str, ...]], required("MODEL [MODEL ...]")]
    # tasks to evaluate on
    tasks: Annotated[tuple[Literal["hellaswag"] | TaskName, ...], metavar("TASK [TASK ...]")] = (
        "hellaswag", *get_args(TaskName)
    )  # fmt: skip
    limit: Annotated[Positive | None, metavar("N", "all examples")] = None  # evaluate only the first N examples of each
    json: Annotated[Path | None, metavar("PATH", "no file")] = None  # also write the scores to this file
    device: Literal["auto", "cuda", "cpu", "mps"] = "auto"  # device to run on; auto: CUDA if available, otherwise CPU
    # data type for matrix multiplications; auto: bfloat16 if the device supports it, otherwise float32
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    # rows of 512 tokens per forward pass
    batch_size: Annotated[Positive, metavar("ROWS")] = 16


def load(
    task: Literal["hellaswag"] | TaskName, model: GPT, limit: int | None, ranks: Ranks
) -> tuple[tuple[Metric, ...], list[Example]]:
    """Return the metrics and the examples of a task, after the main process has downloaded them if needed."""
    if task == "hellaswag":
        return ("acc", "acc_norm"), fetch_examples(None, "en", model.tokenizer, "lm-eval", limit, ranks)
    ranks.main_process_first(lambda: tasks.fetch(task))
    return tasks.TASKS[task].metrics, tasks.load_examples(task, model.tokenizer, limit)


def format_table(scores: dict[str, list[TaskScore]]) -> str:
    """Return a table with a row per metric and a column per model."""
    first = next(iter(scores.values()))
    rows = [["task", "metric", "examples", *scores, "GPT-2 124M, published"]]
    for i, score in enumerate(first):
        digits = 1 if score.metric == "perplexity" else 4
        values = [f"{found[i].value:,.{digits}f} +-{found[i].stderr:,.{digits}f}" for found in scores.values()]
        published = PUBLISHED.get((score.task, score.metric))
        rows.append([
            score.task, score.metric, f"{score.total:,}", *values, "" if published is None else f"{published:.3f}"
        ])  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def main() -> None:
    args = parse_arguments(EvaluateArgs, "python -m tools.evaluate", __doc__)
    if not args.models:
        raise UserError("No model given. Use python -m tools.evaluate out/NAME.")
    scores: dict[str, list[TaskScore]] = {}
    with process_group(args.device) as ranks:
        for spec in args.models:
            model = ranks.main_process_first(partial(GPT.from_pretrained, spec, ranks.device))
            if model.tokenizer.is_character_level:
                raise UserError(f"{spec} has a tokenizer of characters, which cannot encode the texts of the tasks.")
            scores[spec] = []
            for task in args.tasks:
                metrics, examples = load(task, model, args.limit, ranks)
                found = tasks.evaluate(model, task, metrics, examples, ranks, args.dtype, args.batch_size)
                scores[spec] += found
                for score in found:
                    console.info(f"{spec}: {score}")
        if ranks.is_main:
            print(format_table(scores))
            if args.json is not None:
                rows = [{"model": spec} | asdict(score) for spec, listed in scores.items() for score in listed]
                files.write(args.json, (json.dumps(rows, indent=1) + "\n").encode())


if __name__ == "__main__":
    run(main)
