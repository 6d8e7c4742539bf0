"""Read and write Hugging Face's GPT-2 format."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from babygpt.errors import UserError

# its Conv1D keeps these matrices transposed
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def read_config(config_json: Path) -> dict:
    """The fields of the architecture in a `config.json` of Hugging Face's GPT-2; UserError if ours differs from it."""
    try:
        values = json.loads(config_json.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{config_json} is not JSON: {error}") from None
    if values.get("model_type") != "gpt2" or values.get("activation_function", "gelu_new") != "gelu_new":
        raise UserError(f"{config_json} is no GPT-2: model_type is {values.get('model_type')!r}.")
    names = {"block_size": "n_positions", "vocab_size": "vocab_size", "n_layer": "n_layer", "n_head": "n_head"}
    names |= {"n_embd": "n_embd"}
    if missing := [theirs for theirs in names.values() if not isinstance(values.get(theirs), int)]:
        raise UserError(f"{config_json} lacks {', '.join(missing)}.")
    fields = {ours: values[theirs] for ours, theirs in names.items()}
    return fields | {"tie_head": values.get("tie_word_embeddings", True)}


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a model.safetensors; UserError if it is corrupted."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is corrupted ({error}). Copy or download it again.") from None


def load_tensors(
    ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], vocab_size: int, tie_head: bool
) -> None:
    """Copies Hugging Face's GPT-2 tensors into a model's own state dict. Fewer positions keep the first ones; rows of
    the tables from `vocab_size` on are padding. UserError if names or shapes differ."""
    loaded = set()
    for name, tensor in theirs.items():
        name = name.removeprefix("transformer.")
        if name.endswith((".attn.bias", ".attn.masked_bias")):
            continue  # the causal mask, not a parameter
        if name not in ours:
            raise UserError(f"these GPT-2 weights have a tensor {name} that the model has not.")
        tensor = tensor.t() if name.endswith(TRANSPOSED) else tensor
        target = ours[name]
        if name in ("wte.weight", "lm_head.weight"):
            target.zero_()
            target = target[:vocab_size]  # the rows below pad
        elif name == "wpe.weight":
            tensor = tensor[: target.size(0)]
        if target.shape != tensor.shape:
            raise UserError(f"{name} is {tuple(tensor.shape)} in the weights, {tuple(target.shape)} in the model.")
        target.copy_(tensor)
        loaded.add(name)
    missing = set(ours) - loaded - ({"lm_head.weight"} if tie_head else set())
    if missing:
        raise UserError(f"these GPT-2 weights lack {', '.join(sorted(missing))}.")


def export_tensors(ours: dict[str, torch.Tensor], vocab_size: int) -> dict[str, torch.Tensor]:
    """A model's state dict under Hugging Face's GPT-2 names and shapes, padding cut off."""
    state = {}
    for name, tensor in ours.items():
        tensor = tensor.t() if name.endswith(TRANSPOSED) else tensor
        if name in ("wte.weight", "lm_head.weight"):
            tensor = tensor[:vocab_size]
        state[name if name == "lm_head.weight" else f"transformer.{name}"] = tensor.contiguous()
    return state
