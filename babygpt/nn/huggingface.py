"""Hugging Face's GPT-2 format: configuration and state dict, in both directions.

The state dict has the names of model.GPT with the prefix `transformer.` (except for lm_head), and the matrices of its
Conv1D layers are transposed.
"""

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file

from babygpt.errors import UserError
from babygpt.nn.cross_entropy import padded_vocab_size

FILES = CONFIG, WEIGHTS = ("config.json", "model.safetensors")
FIELDS = {
    "n_positions": "block_size", "vocab_size": "vocab_size", "n_layer": "n_layer", "n_head": "n_head",
    "n_embd": "n_embd",
}  # fmt: skip
# fields that change what the model computes, with the only supported value, which is also the default
SUPPORTED = {
    "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False,
}  # fmt: skip
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
TABLES = ("wte.weight", "lm_head.weight")  # with one row per vocabulary entry


def is_model(directory: Path) -> bool:
    """Return whether a directory has the files of a Hugging Face model."""
    return all((directory / name).exists() for name in FILES)


def read(directory: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the fields of GPTConfig and the state dict of a directory. UserError if it is not an intact GPT-2."""
    path = directory / WEIGHTS
    try:
        return read_config(directory / CONFIG), load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is corrupted ({error}). Copy or download it again.") from None


def read_config(path: Path) -> dict[str, Any]:
    """Return the fields of GPTConfig in the config.json of a GPT-2. UserError if it is not one."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}). Copy or download it again.") from None
    if not isinstance(values, dict) or values.get("model_type") != "gpt2":
        model_type = values.get("model_type") if isinstance(values, dict) else None
        raise UserError(f"{path} is not a GPT-2 configuration: its model_type is {model_type!r}.")
    for name, supported in SUPPORTED.items():
        if values.get(name, supported) != supported:
            raise UserError(f"{path}: {name} is {values[name]!r}, but only {supported!r} is supported.")
    if missing := [theirs for theirs in FIELDS if not isinstance(values.get(theirs), int)]:
        raise UserError(f"{path} lacks an integer value for {', '.join(missing)}. Copy or download it again.")
    config = {ours: values[theirs] for theirs, ours in FIELDS.items()}
    return config | {
        "n_kv_head": None, "dropout": 0.0, "bias": True, "tie_head": values.get("tie_word_embeddings", True)
    }  # fmt: skip


def import_tensors(theirs: dict[str, torch.Tensor], config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Convert a state dict of Hugging Face to the names and shapes of model.GPT.

    The tables keep `config["vocab_size"]` rows and are padded with zeros. UserError if a table has fewer rows.
    """
    vocab_size, tensors = config["vocab_size"], {}
    for name, tensor in theirs.items():
        name = name.removeprefix("transformer.")
        if name.endswith((".attn.bias", ".attn.masked_bias")) or (name == "lm_head.weight" and config["tie_head"]):
            continue  # causal masks, and the second name of wte.weight
        if name.endswith(("wpe.weight", *TABLES, *TRANSPOSED)) and tensor.dim() != 2:
            raise UserError(
                f"{name} has shape {tuple(tensor.shape)}, but must have two dimensions. Download the model again."
            )
        if name in TABLES:
            if len(tensor) < vocab_size:
                raise UserError(
                    f"{name} has {len(tensor):,} rows, fewer than the vocabulary size of {vocab_size:,}. Download the "
                    "model again."
                )
            tensor = F.pad(tensor[:vocab_size], (0, 0, 0, padded_vocab_size(vocab_size) - vocab_size))
        tensors[name] = tensor.t() if name.endswith(TRANSPOSED) else tensor
    return tensors


def export_tensors(ours: dict[str, torch.Tensor], config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Convert a state dict of model.GPT to that of GPT2LMHeadModel, without the padding of the tables.

    `config` has the fields of GPTConfig. UserError if the format cannot express the model.
    """
    obstacles = {
        "the architecture of the modern recipe": "rope" in config,
        "grouped-query attention": config["n_kv_head"] not in (None, config["n_head"]),
        "no biases": not config["bias"],
    }
    if reasons := [name for name, is_present in obstacles.items() if is_present]:
        raise UserError(
            f"Hugging Face's GPT-2 format cannot express this model, because it has {' and '.join(reasons)}."
        )
    state = {}
    for name, tensor in ours.items():
        if name in TABLES:
            tensor = tensor[: config["vocab_size"]]
        tensor = tensor.t() if name.endswith(TRANSPOSED) else tensor
        state[name if name == "lm_head.weight" else f"transformer.{name}"] = tensor.contiguous()
    return state
