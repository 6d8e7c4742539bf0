"""Evaluate a chat model on held-out records: the loss of the answers, and the accuracy at preferring the chosen ones.

    python -m tools.evaluate_chat out/gpt2 instructions.jsonl        # before finetuning
    python -m tools.evaluate_chat out/gpt2-sft instructions.jsonl
    python -m tools.evaluate_chat out/gpt2-sft-dpo preferences.jsonl --reference out/gpt2-sft

The records are those of the split `test`, which finetune.py does not read. The special tokens of the chat template are
added to a base model as at the start of finetuning. The loss is a mean over all tokens of the assistant messages; for
preferences, of the chosen answers. The accuracy is the fraction of pairs of which the chosen answer has the higher
log-probability, relative to that under the reference model if one is given; a tie counts half. Two baselines without a
model learn from the split `train`: one prefers longer or shorter answers, the other is a naive Bayes classifier of
words and pairs of words.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from annotated_types import Ge, Lt
from tyro.conf import Positional

from babygpt.chat import baselines
from babygpt.chat.conversations import DataSource, Kind, find_kind, prepare, read_split
from babygpt.chat.dpo import score_sequences
from babygpt.chat.packing import tokenize
from babygpt.chat.template import ChatTemplate
from babygpt.chat.vocabulary import with_chat_tokens
from babygpt.constraints import ModelArgument, metavar, parse_arguments
from babygpt.errors import ConfigError, UserError, run
from babygpt.pretrained import Pretrained, read_pretrained
from babygpt.training.distributed import Ranks, process_group
from babygpt.training.log import standard_error
from babygpt.training.run_dir import read_config
from finetune import DATA_DIRECTORY
from model import GPT, build_model, config_from_dict

HELD_OUT = 0.1  # the default of finetune.py


@dataclass(frozen=True, kw_only=True)
class EvaluateChatArgs:
    """The command line: each field is a flag, and its comment is the help."""

    model: ModelArgument  # model that finetune.py trained, or a base model
    # jsonl or json file, dataset on the Hugging Face Hub, or prepared directory
    data: Annotated[Positional[str], metavar("DATA")]
    reference: Annotated[str | None, metavar("MODEL", "none")] = None  # initial model of DPO
    split: Literal["val", "test"] = "test"  # held-out records to use
    # fraction of the prompts in test
    held_out: Annotated[float | None, Ge(0), Lt(0.5), metavar("FRACTION", "that of the run, or 0.1")] = None
    device: Literal["auto", "cuda", "cpu", "mps"] = "auto"  # device to run on; auto: CUDA if available, otherwise CPU
    # data type for matrix multiplications; auto: bfloat16 if the device supports it, otherwise float32
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"


@dataclass(frozen=True)
class Scores:
    """The scores of a model on the answers of a split."""

    log_probs: np.ndarray  # (count,) float64; those of preferences alternate: chosen, rejected
    loss: float  # of the conversations or the chosen answers, in nats per token
    count: int  # of these


def build_chat_model(weights: Pretrained, device: torch.device | str = "cpu") -> tuple[GPT, ChatTemplate]:
    """Return a model in eval mode and its template. A base model gets the special tokens as at the start of SFT."""
    weights = with_chat_tokens(weights)
    model = weights.build(lambda values: build_model(config_from_dict(values)))
    return model.to(device).eval(), ChatTemplate(weights.tokenizer)


def score(spec: str, directory: Path, kind: Kind, args: EvaluateChatArgs, ranks: Ranks) -> Scores:
    """Return the scores of a model. UserError if no answer fits into its context."""
    model, template = build_chat_model(ranks.main_process_first(lambda: read_pretrained(spec)), ranks.device)
    sequences = ranks.main_process_first(lambda: tokenize(directory, args.split, template, kind))
    block_size = model.config.block_size
    log_probs = score_sequences(model, sequences, block_size, ranks, args.dtype)
    counts = sequences.num_supervised(block_size)
    step = 2 if kind == "preferences" else 1
    used = np.repeat(counts.reshape(-1, step).all(axis=1), step)  # not those without a token after truncation
    log_probs, counts = log_probs[used], counts[used]
    if not counts[::step].sum():
        raise UserError(f"The split {args.split} of {directory} has no answers within {block_size:,} tokens.")
    return Scores(
        log_probs, -log_probs[::step].sum() / counts[::step].sum(), len(counts) // step
    )  # fmt: skip


def held_out_of(model: str) -> float | None:
    """Return the fraction of the prompts that a run of finetune.py held out, or None for another model."""
    return read_config(Path(model) / "config.json").get("chat", {}).get("held_out")


def fraction_held_out(args: EvaluateChatArgs) -> float:
    """Return the fraction of the run of the model. ConfigError if another one is given: test would contain train."""
    used = held_out_of(args.model)
    if used is not None and args.held_out not in (None, used):
        raise ConfigError(
            f"--held-out {args.held_out} is not that of {args.model}, {used}, so the model may have been trained on "
            "the test records. Omit it."
        )
    return used if used is not None else HELD_OUT if args.held_out is None else args.held_out


def describe_accuracy(correct: float, count: int) -> str:
    return f"{correct:.4f} +-{standard_error(correct, count):.4f} ({count:,} pairs)"


def main() -> None:
    args = parse_arguments(EvaluateChatArgs, "python -m tools.evaluate_chat", __doc__)
    source = DataSource(args.data)
    kind = find_kind(source)
    with process_group(args.device) as ranks:
        held_out = fraction_held_out(args)
        directory = ranks.main_process_first(lambda: prepare(source, kind, held_out, DATA_DIRECTORY))
        reference = None if args.reference is None else score(args.reference, directory, kind, args, ranks).log_probs
        scores = score(args.model, directory, kind, args, ranks)
        if not ranks.is_main:
            return
        print(f"response loss {scores.loss:.4f} ({scores.count:,} records of {args.split})")
        if kind == "preferences":
            ratios = scores.log_probs if reference is None else scores.log_probs - reference
            chosen, rejected = ratios.reshape(-1, 2).T
            method = "without a reference" if reference is None else f"relative to {args.reference}"
            accuracy = describe_accuracy(float((np.sign(chosen - rejected) + 1).mean() / 2), len(chosen))
            print(f"preference accuracy {accuracy}, {method}")
            train, records = (list(read_split(directory, split)) for split in ("train", args.split))
            for name, baseline in (("length", baselines.length_score), ("n-grams", baselines.ngram_score)):
                accuracy = describe_accuracy(baselines.accuracy(baseline(train), records), len(records))
                print(f"baseline of {name}: preference accuracy {accuracy}")


if __name__ == "__main__":
    run(main)
