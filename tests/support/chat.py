"""Tiny models and data for the tests of finetuning."""

import json
import random
from pathlib import Path

import torch

from babygpt.data.tokenizer import load_tokenizer
from babygpt.training.checkpoint import model_tensors
from babygpt.training.checkpoint import save as save_checkpoint
from model import GPT, GPTConfig, ModernConfig, build_model
from support.helpers import save
from train_config import MODERN_MODEL

WORDS = "the model reads small data and writes a large shard of new tokens".split()  # noqa: SIM905
SHAPE = {"block_size": 96, "n_layer": 2, "n_head": 2, "n_embd": 32}


def make_base_model(dataset: Path, out: Path, modern: bool = False, **fields: object) -> GPT:
    """Write a run directory with a random model and the tokenizer of `dataset`, and return the model."""
    tokenizer = load_tokenizer(dataset)
    torch.manual_seed(1)
    shape = SHAPE | {"vocab_size": tokenizer.vocab_size} | fields
    model = build_model(
        ModernConfig(**{**MODERN_MODEL, "value_embeddings": 1}, **shape) if modern else GPTConfig(**shape)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    state = {"step": 7, "model": vars(model.config), "tokenizer": {"name": "tokenizer.json"}}
    save_checkpoint(out, 7, model_tensors(model), {}, state, keep=0)
    (out / "tokenizer.json").write_bytes(tokenizer.data)
    return model.eval()


def random_words(rng: random.Random, count: int) -> str:
    return " ".join(rng.choices(WORDS, k=count))


def save_instructions(path: Path, count: int, longest: int = 8) -> Path:
    """Write `count` records with instruction and output."""
    rng = random.Random(0)
    records = [
        {
            "instruction": f"{i} {random_words(rng, rng.randint(1, longest))}",
            "output": random_words(rng, rng.randint(1, 5)),
        }
        for i in range(count)
    ]
    return save(path, "".join(json.dumps(record) + "\n" for record in records).encode())


def save_preferences(path: Path, count: int) -> Path:
    """Write `count` records with prompt, chosen and rejected; a chosen answer ends with a full stop."""
    rng = random.Random(1)
    records = [
        {"prompt": f"{i} {random_words(rng, rng.randint(1, 4))}", "chosen": f"{random_words(rng, rng.randint(1, 4))}.",
         "rejected": f"{random_words(rng, rng.randint(1, 4))}!"}
        for i in range(count)
    ]  # fmt: skip
    return save(path, "".join(json.dumps(record) + "\n" for record in records).encode())
