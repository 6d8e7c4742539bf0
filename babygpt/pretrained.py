"""Find and read trained models: runs, checkpoints, Hugging Face directories, GPT-2 on the hub.

>>> pretrained = read_pretrained("out/gpt2")
>>> model = pretrained.build(make_model)  # make_model(config) returns a module
"""

import os
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from babygpt import hub
from babygpt.data.tokenizer import GPT2Tokenizer, Tokenizer, load_model_tokenizer, load_tokenizer
from babygpt.errors import ConfigError, UserError
from babygpt.nn import huggingface
from babygpt.training import checkpoint
from babygpt.training.run_dir import differences

HUB_MODELS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
HUB_DIRECTORY = Path("data") / "huggingface"
NANOGPT_VOCAB_SIZE = 50304  # nanoGPT's default: GPT-2's 50,257 entries, padded

Model = TypeVar("Model", bound=nn.Module)


@dataclass
class Pretrained:
    """The weights of a model by parameter name, with its configuration and tokenizer."""

    config: dict[str, Any]  # fields of the model's configuration
    tensors: dict[str, torch.Tensor]
    tokenizer: Tokenizer
    source: str  # path or name, for messages
    step: int | None = None  # number of updates in the run; None if the weights are not from a run

    def build(self, make: Callable[[dict[str, Any]], Model]) -> Model:
        """Return `make(config)` with these weights. UserError, before memory is allocated, if they do not fit."""
        try:
            layers = max(self.config["n_layer"], self.config.get("value_embeddings", 0))
            if layers > len(self.tensors):
                raise ValueError(f"{layers:,} layers, but only {len(self.tensors)} tensors")
            with torch.device("meta"):
                checkpoint.check_fit(make(self.config), self.tensors)
            model = make(self.config)
        except (KeyError, TypeError, ValueError, RuntimeError, ArithmeticError) as error:
            raise UserError(
                f"{self.source} has weights that do not match its configuration ({error!r:.300}). Copy or "
                "download the model again."
            ) from None
        checkpoint.load_model_tensors(model, self.tensors)
        return model

    def adapt(self, config: dict[str, Any]) -> "Pretrained":
        """Return the weights for a model of this configuration.

        Dropout may differ, and block_size may be smaller: the first positions are kept. ConfigError if any other field
        differs. A field that is missing from one of the two counts as off.
        """
        may_differ = {"model.dropout"}
        if config["block_size"] < self.config["block_size"]:
            may_differ.add("model.block_size")
        differing = differences({"model": self.config}, {"model": config})
        if lines := [
            f"  {name}: {weights_value} in the weights, {config_value} in the settings\n"
            for name, weights_value, config_value in differing
            if name not in may_differ
        ]:
            raise ConfigError(
                f"The weights of {self.source} do not match the architecture in the settings:\n{''.join(lines)}"
                "Remove the --model flags, or use other weights."
            )
        tensors = dict(self.tensors)
        if "wpe.weight" in tensors:
            tensors["wpe.weight"] = tensors["wpe.weight"][: config["block_size"]]
        return Pretrained(config, tensors, self.tokenizer, self.source, self.step)


def read_pretrained(spec: str | Path) -> Pretrained:
    """Read the weights of a run directory (its latest checkpoint), a checkpoint directory, a directory of tools.export
    or a Hugging Face GPT-2, a ckpt.pt of nanoGPT, or one of HUB_MODELS, which is downloaded once.

    UserError if there is no intact model.
    """
    path = Path(spec)
    if path.suffix == ".pt" and os.path.isfile(path):
        return _from_nanogpt(path)
    if os.path.isdir(path):  # unlike Path.is_dir, this is False if the name is too long
        if (latest := checkpoint.resolve(path)) is not None:
            return _from_checkpoint(latest)
        if huggingface.is_model(path):
            return _from_huggingface(path, str(spec))
    if str(spec) in HUB_MODELS:
        directory = HUB_DIRECTORY / str(spec)
        for file in huggingface.FILES:
            hub.download(f"openai-community/{spec}", file, None, directory, "model")
        return _from_huggingface(directory, str(spec))
    raise UserError(
        f"There is no model at {spec}. Use a run directory (out/NAME), a checkpoint directory, a Hugging Face GPT-2 "
        f"directory, a ckpt.pt of nanoGPT, or one of {', '.join(HUB_MODELS)}."
    )


def read_architecture(spec: str | Path) -> dict[str, Any] | None:
    """Return the fields of the model's configuration of a model that is not one of HUB_MODELS, or None."""
    path = Path(spec)
    if path.suffix == ".pt" and os.path.isfile(path):
        return _from_nanogpt(path).config
    if not os.path.isdir(path):
        return None
    if (latest := checkpoint.resolve(path)) is not None:
        return checkpoint.read_state(latest)["model"]
    return huggingface.read_config(path / huggingface.CONFIG) if huggingface.is_model(path) else None


def _from_checkpoint(path: Path) -> Pretrained:
    loaded = checkpoint.load(path, with_optimizer=False)
    state, name = loaded.state, loaded.state["tokenizer"]["name"]
    tokenizer = load_tokenizer("gpt2" if name == "gpt2" else path.resolve().parent.parent / name)
    return Pretrained(state["model"], loaded.model, tokenizer, str(path), state["step"])


def _from_huggingface(directory: Path, source: str) -> Pretrained:
    config, state_dict = huggingface.read(directory)
    tokenizer = load_model_tokenizer(directory, config["vocab_size"])
    config["vocab_size"] = tokenizer.vocab_size  # the other rows of the embedding are padding
    return Pretrained(config, huggingface.import_tensors(state_dict, config), tokenizer, source)


def _from_nanogpt(path: Path) -> Pretrained:
    """Read a checkpoint of nanoGPT's train.py, with the tokenizer.json next to it, or GPT-2's tokenizer."""
    names = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "bias")
    try:
        if not zipfile.is_zipfile(path):  # the format of torch.save
            raise ValueError("it was not written by torch.save")
        loaded = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(loaded, dict):
            raise TypeError("it is not a dictionary")
        values, state_dict = loaded["model_args"], loaded["model"]
        config = {name: values[name] for name in names}
        if not all(isinstance(tensor, torch.Tensor) for tensor in dict(state_dict).values()):
            raise TypeError("its model is not a state dict")
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} contains objects other than tensors. It is not loaded, because it could execute code."
        ) from None
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError, EOFError) as error:
        raise UserError(f"{path} is not a checkpoint of nanoGPT ({error!r:.200}). Use another file.") from None
    config |= {"n_kv_head": None, "dropout": 0.0, "tie_head": True, "exact_gelu": True}
    if config["vocab_size"] == NANOGPT_VOCAB_SIZE:
        config["vocab_size"] = GPT2Tokenizer.vocab_size
    tokenizer = load_model_tokenizer(path.parent, config["vocab_size"])
    state_dict = {name.removeprefix("_orig_mod."): tensor for name, tensor in state_dict.items()}
    tensors = huggingface.import_tensors(state_dict, config, conv1d=False)
    return Pretrained(config, tensors, tokenizer, str(path))
