"""Finetune a model on conversations (SFT) or on preferences (DPO).

    python finetune.py sft out/gpt2 instructions.jsonl               # supervised finetuning: writes out/gpt2-sft
    python finetune.py dpo out/gpt2-sft preferences.jsonl            # writes out/gpt2-sft-dpo
    python finetune.py sft gpt2 HuggingFaceTB/smoltalk --config all --held-out 0.005
    torchrun --standalone --nproc_per_node=8 finetune.py sft out/gpt2 instructions.jsonl
    python finetune.py resume out/gpt2-sft                           # resume a stopped run

SFT trains on the assistant messages, with conversations packed into rows of block_size tokens. DPO trains on pairs of
answers, of which one is preferred. docs/chat.md describes the records. The prompts in `val` are used for validation;
those in `test` are never read. The training loop, checkpoints and log are those of train.py.
"""

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from arguments import with_momentum_defaults
from babygpt.chat import dpo
from babygpt.chat.conversations import DataSource, Kind, first_prompt, prepare, read_manifest, read_split
from babygpt.chat.packing import PackedBatch, Sequences, best_fit_decreasing, collate, tokenize
from babygpt.chat.reply import limit_to_context, reply
from babygpt.chat.template import ChatTemplate, Conversation
from babygpt.chat.vocabulary import with_chat_tokens
from babygpt.console import counted
from babygpt.constraints import parse_arguments
from babygpt.data.tokenizer import Tokenizer, load_tokenizer
from babygpt.errors import ConfigError
from babygpt.errors import run as run_script
from babygpt.evaluation.validation import mean_loss
from babygpt.nn.generation import SamplingParams
from babygpt.pretrained import Pretrained, read_pretrained
from babygpt.settings import variant
from babygpt.training import run_dir
from babygpt.training.device import autocast, uses_bfloat16
from babygpt.training.distributed import Ranks, process_group
from babygpt.training.log import Row
from babygpt.training.prefetch import Prefetcher
from babygpt.training.seeds import permutation
from babygpt.training.signals import StopRequested
from dataloader import Batch, Position
from finetune_config import FinetuneArgs, FinetuneConfig, given_flags, new_config, resumed_config
from model import GPT, build_model, config_from_dict
from train import Stop, launch_run
from train_config import Config

DATA_DIRECTORY = Path("data/chat")  # of prepared data

# ---------------------------------------------------------------------------------------------------------
# what SFT and DPO have in common


class Finetuning(ABC):
    """An objective whose epoch is a list of examples: rows for SFT, pairs for DPO.

    A step takes `per_step` of them, and the last step of an epoch takes the rest. Rank r of W ranks takes those with
    index mod W = r. Each example is read once per epoch, in an order that depends on seed and epoch.
    """

    kind: Kind
    columns: tuple[str, ...] = ()

    def __init__(self, config: FinetuneConfig, directory: Path, tokenizer: Tokenizer):
        self.config, self.tokenizer, self.template = config, tokenizer, ChatTemplate(tokenizer)
        self.directory, self.block_size = directory, config.model.block_size
        self.train = tokenize(directory, "train", self.template, self.kind)
        self.val = tokenize(directory, "val", self.template, self.kind)
        self.lengths, self.targets = self.train.lengths(self.block_size), self.train.num_supervised(self.block_size)
        self.val_targets = self.val.num_supervised(self.block_size)
        self.kept = self.usable(self.train)
        if not len(self.kept):
            raise ConfigError(
                f"No answer in {directory} begins within the first {self.block_size:,} tokens. Use shorter prompts, or "
                "a larger block_size."
            )
        self.epoch = lru_cache(maxsize=2)(self.examples_of_epoch)  # two: at the end of an epoch, the next one is needed
        self.num_examples = len(self.epoch(0))  # the same for every epoch
        epochs, steps = config.training.epochs, math.ceil(self.num_examples / config.chat.per_step)
        max_steps = config.training.max_steps if epochs is None else max(1, round(epochs * steps))
        self.config = variant(
            config,
            training={"max_steps": max_steps},
            optimizer={"warmup_steps": round(config.chat.warmup_fraction * max_steps)},
            validation={"every_n_steps": config.validation.every_n_steps if len(self.usable(self.val)) else 0},
        )
        data = {
            "fingerprint": read_manifest(directory)["splits"]["train"]["sha256"], "template": self.template.sha256,
            "method": config.chat.method, "block_size": self.block_size, "seed": config.general.seed,
            "reference": config.chat.reference,
        }  # fmt: skip
        self.identity = {
            "model": asdict(config.model), "data": data, "optimizer": {"name": config.optimizer.name},
            "tokenizer": {"name": tokenizer.name, "sha256": tokenizer.sha256},
        }  # fmt: skip

    @property
    def micro_batch_size(self) -> int:
        """Examples per forward pass of one rank. A pair counts as two rows."""
        rows = self.config.training.micro_batch_size
        return max(1, rows // 2 if self.kind == "preferences" else rows)

    @property
    def num_truncated(self) -> int:
        return int((np.diff(self.train.starts) - 1 > self.block_size).sum())

    def usable(self, sequences: Sequences) -> np.ndarray:
        """Return the indices of the conversations with a supervised token after truncation, ascending, int64."""
        return np.flatnonzero(sequences.num_supervised(self.block_size))

    @abstractmethod
    def examples_of_epoch(self, epoch: int) -> list[Any]:
        """Return the examples of an epoch in order."""

    @abstractmethod
    def batch(self, start: Position, examples: list[Any], local: list[list[Any]], pin: bool) -> Batch:
        """Return the batch of a step with these examples. `local` are those of each micro-batch of this rank."""

    def batches(self, position: Position, ranks: Ranks) -> Prefetcher[Batch]:
        return ExampleLoader(self, position, ranks)

    def adapt(self, weights: Pretrained) -> Pretrained:
        return with_chat_tokens(weights).adapt(asdict(self.config.model))

    def steps_summary(self, unit: str) -> str:
        per_step, max_steps = self.config.chat.per_step, self.config.training.max_steps
        steps = math.ceil(self.num_examples / per_step)
        return (
            f"{counted(per_step, unit)} per step, {counted(steps, 'step')} per epoch, {max_steps / steps:.2f} epochs "
            f"in {counted(max_steps, 'step')}"
        )

    def complete(self, model: GPT, params: SamplingParams, stop: Stop) -> list[str]:
        """Return held-out prompts, each with the model's reply."""
        texts = []
        for messages in self.sample_prompts():
            limited = limit_to_context(params, len(self.template.prompt(messages)), self.block_size)
            answer = "".join(reply(model, self.template, messages, limited, stop))
            texts.append("\n".join(f"{m['role']}: {m['content']}" for m in messages) + f"\nassistant: {answer}")
        return texts

    def sample_prompts(self) -> list[Conversation]:
        """Return the first prompts of val that leave half of the context for the reply, or a greeting without any."""
        prompts: list[Conversation] = []
        for record in read_split(self.directory, "val"):
            prompt = first_prompt(record)
            if prompt and len(self.template.prompt(prompt)) <= self.block_size // 2:
                prompts.append(prompt)
            if len(prompts) == self.config.sampling.num_samples:
                break
        return prompts or [[{"role": "user", "content": "Hello!"}]]


class ExampleLoader(Prefetcher[Batch]):
    """An endless iterator over the batches of one rank."""

    def __init__(self, objective: Finetuning, position: Position, ranks: Ranks):
        self.objective, self.ranks = objective, ranks
        self.per_step = objective.config.chat.per_step
        super().__init__(position, ranks.device)

    def read_batch(self, position: Position) -> Batch:
        if position.n >= self.objective.num_examples:
            position = Position(position.epoch + 1, 0)
        rank, W, size = self.ranks.rank, self.ranks.world_size, self.objective.micro_batch_size
        examples = self.objective.epoch(position.epoch)[position.n : position.n + self.per_step]
        local = [example for n, example in enumerate(examples, position.n) if n % W == rank]
        # the same number of micro-batches on all ranks, of which the last may be empty
        count = math.ceil(math.ceil(len(examples) / W) / size)
        micro_batches = [local[i * size : (i + 1) * size] for i in range(count)]
        return self.objective.batch(position, examples, micro_batches, self.cuda_device is not None)


# ---------------------------------------------------------------------------------------------------------
# supervised finetuning


class SFT(Finetuning):
    """The loss of the assistant messages, a mean over all their tokens in a step."""

    kind: Kind = "conversations"

    def examples_of_epoch(self, epoch: int) -> list[list[int]]:
        """Return the conversations of each row."""
        seed, lengths = self.config.general.seed, self.lengths[self.kept].tolist()
        rows = best_fit_decreasing(lengths, self.block_size, permutation(len(lengths), seed, epoch).tolist())
        return [self.kept[rows[i]].tolist() for i in permutation(len(rows), seed, epoch)]

    def batch(self, start: Position, examples: list[Any], local: list[list[Any]], pin: bool) -> Batch:
        micro_batches = [self.collate_rows(rows or [[]], pin) for rows in local]
        used = [i for row in examples for i in row]
        return Batch(
            start, Position(start.epoch, start.n + len(examples)), micro_batches, int(self.targets[used].sum()),
            int(self.lengths[used].sum()),
        )  # fmt: skip

    def collate_rows(self, rows: list[list[int]], pin: bool) -> PackedBatch:
        tokens = [[self.train.get(i, self.block_size) for i in row] for row in rows]
        return collate(tokens, self.block_size, self.tokenizer.eot_id, pin)

    def loss(self, model: nn.Module, micro_batch: PackedBatch, device: torch.device) -> torch.Tensor:
        """Return the loss summed over the supervised tokens, (1,) float32."""
        batch = micro_batch.to(device)
        return model(batch.idx, batch.targets, packed=batch.packed(), reduction="sum")[None]

    def validate(self, model: nn.Module, ranks: Ranks, stop: Stop) -> Row:
        """Return the mean loss over the supervised tokens of the held-out conversations."""
        rows = best_fit_decreasing(self.val.lengths(self.block_size).tolist(), self.block_size)[
            ranks.rank :: ranks.world_size
        ]
        size = self.micro_batch_size

        def batches() -> Iterator[tuple]:
            for i in range(0, len(rows), size):
                tokens = [[self.val.get(j, self.block_size) for j in row] for row in rows[i : i + size]]
                batch = collate(tokens, self.block_size, self.tokenizer.eot_id)
                yield batch.idx, batch.targets, batch.to(ranks.device).packed()

        token_bytes = torch.from_numpy(self.tokenizer.token_bytes())
        loss, bits_per_byte = mean_loss(model, batches(), token_bytes, ranks, self.config.training.dtype, stop)
        return {"val_loss": loss, "val_bpb": bits_per_byte}

    def summary(self, ranks: Ranks) -> str:
        used = self.lengths[self.kept].sum() / (self.num_examples * self.block_size)
        return (
            f"{len(self.kept):,} conversations with {self.targets.sum():,} supervised tokens in "
            f"{counted(self.num_examples, 'row')} of {self.block_size:,} tokens ({used:.1%} used); "
            f"{self.num_truncated:,} truncated, {len(self.train) - len(self.kept):,} skipped without a supervised "
            f"token\n{self.steps_summary('row')}"
        )


# ---------------------------------------------------------------------------------------------------------
# direct preference optimization


class DPO(Finetuning):
    """The DPO loss, a mean over the pairs of a step."""

    kind: Kind = "preferences"
    columns: tuple[str, ...] = dpo.COLUMNS

    def __init__(
        self, config: FinetuneConfig, directory: Path, tokenizer: Tokenizer, initial: Pretrained | None, ranks: Ranks
    ):  # fmt: skip
        """`initial` is the reference model, with the special tokens of the template; None if its results are stored."""
        super().__init__(config, directory, tokenizer)
        self.reference: dict[str, np.ndarray] = {}
        model = None if initial is None else initial.build(lambda _: build_model(config.model))
        for split, sequences in (("train", self.train), ("val", self.val)):
            path = reference_path(directory, split, config)
            self.reference[split] = dpo.reference_log_probs(
                model, sequences, path, self.block_size, ranks, config.training.dtype, self.micro_batch_size
            )

    def usable(self, sequences: Sequences) -> np.ndarray:
        """Return the indices of the pairs whose answers differ and have a supervised token each, ascending, int64."""
        pairs = np.flatnonzero(sequences.num_supervised(self.block_size).reshape(-1, 2).all(axis=1))
        differ = [not sequences.are_equal(2 * pair, 2 * pair + 1, self.block_size) for pair in pairs.tolist()]
        return pairs[np.array(differ, bool)]

    def examples_of_epoch(self, epoch: int) -> list[int]:
        return self.kept[permutation(len(self.kept), self.config.general.seed, epoch)].tolist()

    def batch(self, start: Position, examples: list[Any], local: list[list[Any]], pin: bool) -> Batch:
        micro_batches = [self.pairs("train", pairs, examples, pin) for pairs in local]
        num_tokens = int(self.lengths.reshape(-1, 2)[examples].sum())
        return Batch(
            start, Position(start.epoch, start.n + len(examples)), micro_batches, len(examples), num_tokens
        )  # fmt: skip

    def pairs(self, split: Literal["train", "val"], pairs: list[int], all_pairs: Any, pin: bool = False) -> dpo.Pairs:
        """Return a micro-batch of pairs, which are among `all_pairs` of the step or the validation."""
        sequences, targets = (self.train, self.targets) if split == "train" else (self.val, self.val_targets)
        chosen_tokens = targets[0::2][all_pairs].sum()
        batch = dpo.collate_pairs(sequences, pairs, self.block_size, self.tokenizer.eot_id, pin)
        reference = torch.from_numpy(self.reference[split][pairs].reshape(-1, 2))
        return dpo.Pairs(batch, reference, len(all_pairs) / float(chosen_tokens))

    def loss(self, model: nn.Module, micro_batch: dpo.Pairs, device: torch.device) -> torch.Tensor:
        """Return the loss and the values of `columns`, summed over the pairs, (7,) float32."""
        return dpo.summed_losses(model, micro_batch, device, self.config.chat.beta)

    @torch.no_grad()
    def validate(self, model: nn.Module, ranks: Ranks, stop: Stop) -> Row:
        """Return the means over the held-out pairs. If `stop()` is true on any rank, all raise StopRequested."""
        all_pairs, was_training = self.usable(self.val), model.training
        model.eval()
        sums = torch.zeros(1 + len(self.columns), dtype=torch.float64)
        for pairs in dpo.batched(all_pairs[ranks.rank :: ranks.world_size].tolist(), self.micro_batch_size):
            if stop():
                break
            with autocast(ranks.device, self.config.training.dtype):
                losses = dpo.summed_losses(
                    model, self.pairs("val", pairs, all_pairs), ranks.device, self.config.chat.beta
                )
            sums += losses.cpu().double()
        model.train(was_training)
        *totals, stops = ranks.sum([*sums.tolist(), float(stop())])
        if stops:
            raise StopRequested
        names = ["val_loss", *(f"val_{name}" for name in self.columns)]
        return dict(zip(names, (total / len(all_pairs) for total in totals), strict=True))

    def summary(self, ranks: Ranks) -> str:
        skipped = len(self.train) // 2 - self.num_examples
        return (
            f"{counted(self.num_examples, 'pair')} of answers; {self.num_truncated:,} answers truncated, "
            f"{skipped:,} pairs skipped without a supervised token\n{self.steps_summary('pair')}"
        )


# ---------------------------------------------------------------------------------------------------------
# the command


def reference_path(directory: Path, split: str, config: FinetuneConfig) -> Path:
    """Return the file of the log-probabilities of the initial model of DPO."""
    return directory / f"{split}-reference-{config.chat.reference[:16]}.npy"


def make_objective(config: Config, ranks: Ranks) -> SFT | DPO:
    """Prepare the data, load the tokenizer of the model, and compute the reference of DPO."""
    assert isinstance(config, FinetuneConfig), "new_config and resumed_config return this type"
    chat, out = config.chat, config.general.out_dir
    kind: Kind = "preferences" if chat.method == "dpo" else "conversations"
    source = DataSource(config.data.dataset, chat.config, chat.split)
    directory = ranks.main_process_first(lambda: prepare(source, kind, chat.held_out, DATA_DIRECTORY))
    config = variant(config, data={"dataset": str(directory)})  # a resume needs only the prepared data

    def tokenize_splits(template: ChatTemplate) -> None:
        ranks.main_process_first(lambda: [tokenize(directory, split, template, kind) for split in ("train", "val")])

    if config.general.init_from == "resume":  # and not the initial model, unless its log-probabilities are missing
        tokenizer = load_tokenizer(out)
        tokenize_splits(ChatTemplate(tokenizer))
        if kind == "conversations":
            return SFT(config, directory, tokenizer)
        if all(reference_path(directory, split, config).exists() for split in ("train", "val")):
            return DPO(config, directory, tokenizer, None, ranks)

    spec = config.general.init_from
    if spec == "resume":
        spec = run_dir.read_config(out / "config.json")["general"]["init_from"]
    weights = with_chat_tokens(ranks.main_process_first(lambda: read_pretrained(spec)))
    values = weights.config | {"block_size": config.model.block_size, "dropout": 0.0}
    config, template = replace(config, model=config_from_dict(values)), ChatTemplate(weights.tokenizer)
    tokenize_splits(template)
    if kind == "conversations":
        return SFT(config, directory, weights.tokenizer)
    initial = weights.adapt(values)
    data = [split["sha256"] for split in read_manifest(directory)["splits"].values()]
    settings = [template.sha256, uses_bfloat16(ranks.device, config.training.dtype), *data]
    reference = dpo.reference_id(initial.tensors, [*settings, config.model.block_size])
    return DPO(variant(config, chat={"reference": reference}), directory, initial.tokenizer, initial, ranks)


def main() -> None:
    args = parse_arguments(FinetuneArgs, "finetune.py", __doc__)
    make_config = resumed_config if args.method == "resume" else new_config
    config = with_momentum_defaults(make_config(args, given_flags(sys.argv[1:])))
    group = process_group(config.general.device, config.general.timeout_minutes, config.general.deterministic)
    launch_run(config, make_objective, group)


if __name__ == "__main__":
    run_script(main)
