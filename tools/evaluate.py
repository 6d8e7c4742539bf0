"""Evaluate models on several tasks, scored as in lm-evaluation-harness.

    python -m tools.evaluate out/gpt2
    python -m tools.evaluate out/gpt2 out/modern gpt2 --tasks hellaswag lambada piqa --json scores.json
    torchrun --standalone --nproc_per_node=8 -m tools.evaluate out/gpt2

hellaswag, arc_easy, piqa and sciq report `acc`, the accuracy of the answer with the lowest loss, and `acc_norm`, that
of the answer with the lowest loss per character. lambada reports `acc`, the accuracy of greedy decoding, and
`perplexity` of the last word; blimp reports `acc`. babygpt/evaluation/tasks.py describes the data.
"""

import json
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, get_args

from tyro.conf import Positional

from babygpt import files
from babygpt.chat.template import ChatTemplate
from babygpt.console import console
from babygpt.constraints import Positive, metavar, parse_arguments, required
from babygpt.errors import ConfigError, UserError, run
from babygpt.evaluation import tasks
from babygpt.evaluation.packing import Example
from babygpt.evaluation.tasks import Metric, TaskName, TaskScore
from babygpt.pretrained import HUB_MODELS, read_architecture
from babygpt.training.distributed import Ranks, process_group
from hellaswag import fetch_examples
from model import GPT

# accuracies of OpenAI's GPT-2 124M that nanochat reports (dev/estimate_gpt3_core.ipynb), with a different method
PUBLISHED = {
    ("hellaswag", "acc_norm"): 0.309, ("lambada", "acc"): 0.323, ("piqa", "acc_norm"): 0.623,
    ("arc_easy", "acc_norm"): 0.412,
}  # fmt: skip
PUBLISHED_NOTE = (
    "nanochat's values are those of the answer with the lowest loss per token; for piqa and arc_easy, 10 examples "
    "precede each question."
)
EvaluatedTask = Literal["hellaswag"] | TaskName


@dataclass(frozen=True, kw_only=True)
class EvaluateArgs:
    """The command line: each field is a flag, and its comment is the help."""

    # run directories (out/NAME), checkpoints, exported models, or GPT-2 on the Hugging Face Hub: gpt2, gpt2-medium, ...
    models: Annotated[Positional[tuple[str, ...]], required("MODEL [MODEL ...]")]
    # tasks to evaluate on
    tasks: Annotated[tuple[EvaluatedTask, ...], metavar("TASK [TASK ...]")] = (
        "hellaswag", *get_args(TaskName)
    )  # fmt: skip
    limit: Annotated[Positive | None, metavar("N", "all examples")] = None  # evaluate only the first N examples of each
    # score the answers as replies of a chat model to the question; not for blimp, which has no questions
    chat_template: bool = False
    json: Annotated[Path | None, metavar("PATH", "no file")] = None  # also write the scores to this file
    device: Literal["auto", "cuda", "cpu", "mps"] = "auto"  # device to run on; auto: CUDA if available, otherwise CPU
    # data type for matrix multiplications; auto: bfloat16 if the device supports it, otherwise float32
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    # packed rows per forward pass, of 512 tokens each, or 256 on a CPU
    batch_size: Annotated[Positive, metavar("ROWS")] = 16


def load(task: EvaluatedTask, model: GPT, limit: int | None, ranks: Ranks) -> tuple[tuple[Metric, ...], list[Example]]:
    """Return the metrics and the examples of a task, after the main process has downloaded them if needed."""
    if task == "hellaswag":
        return ("acc", "acc_norm"), fetch_examples(None, "en", model.tokenizer, "lm-eval", limit, ranks)
    return tasks.TASKS[task].metrics, tasks.load_tasks((task,), model.tokenizer, limit, ranks)[task]


def as_conversation(example: Example, template: ChatTemplate) -> Example:
    """Return the example with its context as a message of the user, and its endings as replies of the assistant."""
    tokenizer = template.tokenizer
    if example.context == [tokenizer.eot_id]:  # there is no context
        return example
    context = template.prompt([{"role": "user", "content": tokenizer.decode(example.context)}])
    endings = [tokenizer.encode(tokenizer.decode(ending).strip()) for ending in example.endings]
    return replace(example, context=context, endings=endings)


def format_table(scores: dict[str, list[TaskScore]], limit: int | None) -> str:
    """Return a table with a row per metric and a column per model, and published scores of GPT-2 without a limit."""
    rows = [["task", "metric", "examples", *scores, *([] if limit else ["GPT-2 124M (nanochat)"])]]
    for metrics in zip(*scores.values(), strict=True):
        digits = ",.1f" if metrics[0].metric == "perplexity" else ".4f"
        values = [f"{score.value:{digits}} +-{score.stderr:{digits}}" for score in metrics]
        values = [f"{s.value:.3g}" if s.value > 1e6 else text for s, text in zip(metrics, values, strict=True)]
        published = PUBLISHED.get((metrics[0].task, metrics[0].metric), "")
        row = [metrics[0].task, metrics[0].metric, f"{metrics[0].examples:,}", *values]
        rows.append(row if limit else [*row, str(published)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines if limit else [*lines, PUBLISHED_NOTE])


def main() -> None:
    args = parse_arguments(EvaluateArgs, "python -m tools.evaluate", __doc__)
    if not args.models:
        raise UserError("No model given. Use python -m tools.evaluate out/NAME.")
    if args.json is not None and not args.json.parent.is_dir():
        raise UserError(f"There is no directory {args.json.parent} for --json. Create it, or use another path.")
    scores: dict[str, list[TaskScore]] = {}
    with process_group(args.device) as ranks:
        for spec in args.models:
            if spec not in HUB_MODELS and read_architecture(spec) is None:
                raise ConfigError(f"There is no model at {spec}. Use a run directory (out/NAME), or another model.")
        for spec in args.models:
            model = ranks.main_process_first(partial(GPT.from_pretrained, spec, ranks.device))
            if model.tokenizer.is_character_level:
                raise ConfigError(
                    f"{spec} has a character-level tokenizer, which cannot encode the texts of the tasks. Use a model "
                    "with a BPE tokenizer."
                )
            scores[spec] = []
            for task in args.tasks:
                metrics, examples = load(task, model, args.limit, ranks)
                if args.chat_template:
                    template = ChatTemplate(model.tokenizer)
                    examples = [as_conversation(example, template) for example in examples]
                found = tasks.evaluate(model, task, metrics, examples, ranks, args.dtype, args.batch_size)
                scores[spec] += found
                for score in found:
                    console.info(f"{spec}: {score}")
            if ranks.is_main and args.json is not None:
                rows = [{"model": name} | asdict(score) for name, listed in scores.items() for score in listed]
                files.write(args.json, (json.dumps(rows, indent=1) + "\n").encode())
        if ranks.is_main:
            print(format_table(scores, args.limit))


if __name__ == "__main__":
    run(main)
