"""Hugging Face's format of GPT-2, and of exported modern models: configuration and state dict, in both directions.

The state dict of GPT-2 has the names of model.GPT with the prefix `transformer.` (except for lm_head), and the matrices
of its Conv1D layers are transposed. That of a modern model (babygpt/export/modeling_babygpt.py) has the names and
shapes of model.ModernGPT. Neither has the padding of the tables.
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
SUPPORTED: dict[str, Any] = {
    "layer_norm_epsilon": 1e-5, "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False,
}  # fmt: skip
EXACT_GELU = {"gelu_new": False, "gelu_pytorch_tanh": False, "gelu": True}  # by activation_function
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
TABLES = ("wte.weight", "lm_head.weight")  # with one row per vocabulary entry
MODERN = "babygpt"  # model_type of an exported modern model
MODERN_FIELDS = (  # fields of ModernConfig in its config.json; num_bigrams replaces bigram_tables
    "block_size", "vocab_size", "n_layer", "n_head", "n_embd", "n_kv_head", "bias", "tie_head", "exact_gelu", "rope",
    "qk_norm", "relu2", "embedding_norm", "value_embeddings", "partial_key_offset", "x0_shortcut",
    "attention_score_factor", "document_mask", "eot_id", "window",
)  # fmt: skip


def is_model(directory: Path) -> bool:
    """Return whether a directory has the files of a Hugging Face model."""
    return all((directory / name).exists() for name in FILES)


def is_modern(config: dict[str, Any]) -> bool:
    """Return whether a configuration has the fields of ModernConfig."""
    return "rope" in config


def is_table(name: str) -> bool:
    """Return whether a parameter has one row per vocabulary entry."""
    return name in TABLES or name.startswith("vte.")


def read(directory: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the fields of the model's configuration and the state dict of a directory.

    UserError if it is neither an intact GPT-2 nor an intact modern model.
    """
    path = directory / WEIGHTS
    try:
        return read_config(directory / CONFIG), load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is corrupted ({error}). Copy or download it again.") from None


def read_config(path: Path) -> dict[str, Any]:
    """Return the fields of GPTConfig or ModernConfig in a config.json. UserError if it is of another model."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}). Copy or download it again.") from None
    if isinstance(values, dict) and values.get("model_type") == MODERN:
        values = {"exact_gelu": False} | values  # earlier exports lack it
        if missing := [name for name in MODERN_FIELDS if name not in values]:
            raise UserError(f"{path} lacks {', '.join(missing)}. Copy it again.")
        vocab_size, num_bigrams = values["vocab_size"], values.get("num_bigrams", 0)
        if not isinstance(vocab_size, int) or not isinstance(num_bigrams, int) or vocab_size < 1:
            raise UserError(f"{path} has an invalid vocab_size or num_bigrams. Copy it again.")
        tables, rest = divmod(num_bigrams, padded_vocab_size(vocab_size))
        bigrams = {"bigram_tables": tables + (rest > 0), "num_bigrams": num_bigrams if rest else 0}
        return {name: values[name] for name in MODERN_FIELDS} | bigrams | {"dropout": 0.0}
    if not isinstance(values, dict) or values.get("model_type") != "gpt2":
        model_type = values.get("model_type") if isinstance(values, dict) else None
        raise UserError(f"{path} is not a GPT-2 configuration: its model_type is {model_type!r}.")
    for name, supported in SUPPORTED.items():
        if values.get(name, supported) != supported:
            raise UserError(f"{path}: {name} is {values[name]!r}, but only {supported!r} is supported.")
    activation = values.get("activation_function", "gelu_new")
    if activation not in EXACT_GELU:
        raise UserError(f"{path}: activation_function is {activation!r}, but must be one of {', '.join(EXACT_GELU)}.")
    if missing := [theirs for theirs in FIELDS if not isinstance(values.get(theirs), int)]:
        raise UserError(f"{path} lacks an integer value for {', '.join(missing)}. Copy or download it again.")
    config = {ours: values[theirs] for theirs, ours in FIELDS.items()}
    return config | {
        "n_kv_head": None, "dropout": 0.0, "bias": True, "tie_head": values.get("tie_word_embeddings", True),
        "exact_gelu": EXACT_GELU[activation],
    }  # fmt: skip


def import_tensors(
    theirs: dict[str, torch.Tensor], config: dict[str, Any], conv1d: bool = True
) -> dict[str, torch.Tensor]:
    """Convert a state dict of Hugging Face to the names and shapes of our models.

    Without `conv1d`, the matrices are not transposed, as in nanoGPT. The tables keep `config["vocab_size"]` rows and
    are padded with zeros. UserError if a table has fewer rows.
    """
    vocab_size, tensors = config["vocab_size"], {}
    transposed = TRANSPOSED if conv1d and not is_modern(config) else ()
    for name, tensor in theirs.items():
        name = name.removeprefix("transformer.")
        if name.endswith((".attn.bias", ".attn.masked_bias")) or (name == "lm_head.weight" and config["tie_head"]):
            continue  # causal masks, and the second name of wte.weight
        if name.endswith(("wpe.weight", *TABLES, *transposed)) and tensor.dim() != 2:
            raise UserError(
                f"{name} has shape {tuple(tensor.shape)}, but must have two dimensions. Download the model again."
            )
        if is_table(name):
            if len(tensor) < vocab_size:
                raise UserError(
                    f"{name} has {len(tensor):,} rows, fewer than the vocabulary size of {vocab_size:,}. Download the "
                    "model again."
                )
            tensor = F.pad(tensor[:vocab_size], (0, 0, 0, padded_vocab_size(vocab_size) - vocab_size))
        tensors[name] = tensor.t() if name.endswith(transposed) else tensor
    return tensors


def export_tensors(ours: dict[str, torch.Tensor], config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Convert the tensors of model.GPT to the state dict of GPT2LMHeadModel. `config` has the fields of GPTConfig."""
    state = {}
    for name, tensor in expand_tensors(ours, config).items():
        tensor = tensor.t() if name.endswith(TRANSPOSED) else tensor
        state[name if name == "lm_head.weight" else f"transformer.{name}"] = tensor.contiguous()
    return state


def expand_tensors(ours: dict[str, torch.Tensor], config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return equivalent tensors of a GPT-2 with biases and one key and value head per query head.

    Missing biases are zeros, and the key and value heads of grouped-query attention are repeated. The padding of the
    tables is removed, and lm_head.weight, if it is tied.
    """
    tensors = {}
    for name, tensor in ours.items():
        if name == "lm_head.weight" and config["tie_head"]:
            continue
        if name in TABLES:
            tensor = tensor[: config["vocab_size"]]
        elif "attn.c_attn." in name:
            tensor = repeat_heads(tensor, config["n_head"], config["n_kv_head"] or config["n_head"], config["n_embd"])
        tensors[name] = tensor
        if not config["bias"] and name not in (*TABLES, "wpe.weight"):
            tensors[name.removesuffix("weight") + "bias"] = tensor.new_zeros(len(tensor))
    return tensors


def repeat_heads(tensor: torch.Tensor, n_head: int, n_kv_head: int, n_embd: int) -> torch.Tensor:
    """Repeat the rows of key and value heads in a weight or bias of c_attn, so that each query head has its own."""
    head_size = n_embd // n_head
    q, k, v = tensor.split([n_embd, n_kv_head * head_size, n_kv_head * head_size])
    k, v = (
        heads.unflatten(0, (n_kv_head, head_size)).repeat_interleave(n_head // n_kv_head, dim=0).flatten(0, 1)
        for heads in (k, v)
    )
    return torch.cat([q, k, v])


def export_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return the config.json of GPT2LMHeadModel for the fields of GPTConfig."""
    dropout = config["dropout"]
    return {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"],
        **{theirs: config[ours] for theirs, ours in FIELDS.items()}, **SUPPORTED,
        "activation_function": "gelu" if config.get("exact_gelu") else "gelu_new",
        "attn_pdrop": dropout, "embd_pdrop": dropout, "resid_pdrop": dropout,
        "tie_word_embeddings": config["tie_head"],
    }  # fmt: skip
