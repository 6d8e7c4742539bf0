"""Find and read trained models: runs, checkpoints, Hugging Face directories, GPT-2 on the hub.

>>> found = read_pretrained("out/gpt2")
>>> model = found.build(make_model)  # make_model: from the fields of the configuration to a module
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from babygpt import hub
from babygpt.data.tokenizer import Tokenizer, load_model_tokenizer, load_tokenizer
from babygpt.errors import ConfigError, UserError
from babygpt.nn import huggingface
from babygpt.training import checkpoint
from babygpt.training.run_dir import differences

HUB_MODELS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
HUB_DIRECTORY = Path("data") / "huggingface"

Model = TypeVar("Model", bound=nn.Module)


@dataclass
class Pretrained:
    """Weights by parameter name, with all that belongs to them."""

    config: dict[str, Any]  # fields of the model's configuration
    tensors: dict[str, torch.Tensor]
    tokenizer: Tokenizer
    source: str  # where they come from, for messages
    step: int | None = None  # of the training run; None for weights from elsewhere

    def build(self, make: Callable[[dict[str, Any]], Model]) -> Model:
        """Return `make(config)` with these weights. UserError if they do not fit, before memory is allocated."""
        try:
            layers = max(self.config["n_layer"], self.config.get("value_embeddings", 0))
            if layers > len(self.tensors):
                raise ValueError(f"{layers:,} layers, but only {len(self.tensors)} tensors")
            with torch.device("meta"):
                checkpoint.check_fit(make(self.config), self.tensors)
            model = make(self.config)
        except (KeyError, TypeError, ValueError, RuntimeError, ArithmeticError) as error:
            raise UserError(
                f"{self.source} does not contain the model that its configuration describes: {error!r:.300}."
            ) from None
        checkpoint.load_model_tensors(model, self.tensors)
        return model

    def adapt(self, config: dict[str, Any]) -> "Pretrained":
        """Return the weights for a model of this configuration.

        Dropout may differ, and block_size be smaller, which keeps the first positions. ConfigError if any other field
        differs. A field that only one of the two has counts as off.
        """
        free = {"model.dropout"} | ({"model.block_size"} if config["block_size"] < self.config["block_size"] else set())
        differing = differences({"model": self.config}, {"model": config})
        if lines := [
            f"  {name}: {theirs} there, {ours} here\n" for name, theirs, ours in differing if name not in free
        ]:
            raise ConfigError(
                f"The weights of {self.source} have another architecture:\n{''.join(lines)}"
                "Use the preset or the --model flags that match them."
            )
        tensors = dict(self.tensors)
        if "wpe.weight" in tensors:
            tensors["wpe.weight"] = tensors["wpe.weight"][: config["block_size"]]
        return Pretrained(config, tensors, self.tokenizer, self.source, self.step)


def read_pretrained(spec: str | Path) -> Pretrained:
    """Read the weights of a run directory (its latest checkpoint), a checkpoint directory, a Hugging Face GPT-2
    directory, or one of HUB_MODELS, which is downloaded once. UserError if there is no intact model."""
    path = Path(spec)
    if os.path.isdir(path):  # unlike Path.is_dir, this is False for a name that is too long
        if (latest := checkpoint.resolve(path)) is not None:
            return _from_checkpoint(latest)
        if huggingface.is_model(path):
            return _from_huggingface(path, str(spec))
    if str(spec) in HUB_MODELS:
        folder = HUB_DIRECTORY / str(spec)
        for file in huggingface.FILES:
            hub.download(f"openai-community/{spec}", file, None, folder, "model")
        return _from_huggingface(folder, str(spec))
    raise UserError(
        f"There is no model at {spec}. Give a run directory (out/NAME), a checkpoint directory, a Hugging Face GPT-2 "
        f"directory, or one of {', '.join(HUB_MODELS)}."
    )


def _from_checkpoint(path: Path) -> Pretrained:
    found = checkpoint.load(path, with_optimizer=False)
    state, name = found.state, found.state["tokenizer"]["name"]
    tokenizer = load_tokenizer("gpt2" if name == "gpt2" else path.parent.parent / name)
    return Pretrained(state["model"], found.model, tokenizer, str(path), state["step"])


def _from_huggingface(folder: Path, source: str) -> Pretrained:
    config, theirs = huggingface.read(folder)
    tokenizer = load_model_tokenizer(folder, config["vocab_size"])
    config["vocab_size"] = tokenizer.vocab_size  # further rows of the tables are padding and belong to no token
    return Pretrained(config, huggingface.import_tensors(theirs, config), tokenizer, source)
