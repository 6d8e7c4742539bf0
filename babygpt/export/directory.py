"""Write a model as a directory that transformers loads: weights, configuration, tokenizer, model card.

Classic models become GPT2LMHeadModel. Modern ones come with their code, modeling_babygpt.py.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from babygpt import files
from babygpt.chat.template import IM_END, JINJA, ChatTemplate, is_chat_tokenizer
from babygpt.data.tokenizer import Tokenizer, to_json
from babygpt.errors import UserError
from babygpt.nn import huggingface
from babygpt.pretrained import Pretrained

CODE = Path(__file__).with_name("modeling_babygpt.py")


def write_model(model: Pretrained, out: Path) -> None:
    """Write the files of a model except for its card. `out` must exist. UserError if the model has no EOT."""
    if model.tokenizer.eot_id >= model.config["vocab_size"]:
        raise UserError(
            f"{model.source} cannot be exported, because it has no end-of-text token: it is a character-level model of "
            "nanoGPT. Use a model that train.py trained."
        )
    is_modern = huggingface.is_modern(model.config)
    config, tensors = (export_modern if is_modern else export_classic)(model)
    eot, end = model.tokenizer.eot_id, end_of_reply(model.tokenizer)
    special_ids = {"bos_token_id": eot, "eos_token_id": eot if end is None else end, "pad_token_id": eot}
    config |= special_ids | {"torch_dtype": "float32"}
    save_file(tensors, out / huggingface.WEIGHTS, {"format": "pt"})
    files.write_json(out / huggingface.CONFIG, config)
    files.write_json(out / "generation_config.json", special_ids)
    write_tokenizer(model.tokenizer, model.config["block_size"], out)
    if is_modern:
        shutil.copyfile(CODE, out / CODE.name)


def export_classic(model: Pretrained) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the configuration and the weights of GPT2LMHeadModel."""
    return huggingface.export_config(model.config), huggingface.export_tensors(model.tensors, model.config)


def export_modern(model: Pretrained) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the configuration and the weights of BabyGPTForCausalLM, without the padding of the tables."""
    vocab_size, tensors = model.config["vocab_size"], {}
    for name, tensor in model.tensors.items():
        tensors[name] = (tensor[:vocab_size] if huggingface.is_table(name) else tensor).contiguous()
    return {
        "model_type": huggingface.MODERN, "architectures": ["BabyGPTForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{CODE.stem}.BabyGPTConfig", "AutoModelForCausalLM": f"{CODE.stem}.BabyGPTForCausalLM",
        },
        **{name: model.config[name] for name in huggingface.MODERN_FIELDS},
        "num_bigrams": len(tensors.get("bte.weight", ())),
    }, tensors  # fmt: skip


def end_of_reply(tokenizer: Tokenizer) -> int | None:
    """Return the id of the token that ends a message of a chat model, or None if it is not a chat model."""
    return ChatTemplate(tokenizer).im_end_id if is_chat_tokenizer(tokenizer) else None


def write_tokenizer(tokenizer: Tokenizer, block_size: int, out: Path) -> None:
    """Write the files of the tokenizer; that of a chat model has its template."""
    eot, is_chat = tokenizer.decode([tokenizer.eot_id]), is_chat_tokenizer(tokenizer)
    settings = json.loads(to_json(tokenizer))
    settings["post_processor"] = None  # it could add tokens, which neither training nor sampling does
    files.write_json(out / "tokenizer.json", settings)
    files.write_json(out / "tokenizer_config.json", {
        "tokenizer_class": "GPT2TokenizerFast" if tokenizer.name == "gpt2" else "PreTrainedTokenizerFast",
        "bos_token": eot, "eos_token": IM_END if is_chat else eot, "unk_token": eot, "pad_token": eot,
        "add_prefix_space": False, "model_max_length": block_size, "clean_up_tokenization_spaces": False,
        **({"chat_template": JINJA} if is_chat else {}),
    })  # fmt: skip
