"""Write a classic model as a GGUF file for llama.cpp, with the package gguf of its authors."""

import json
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from babygpt.chat.template import JINJA, ChatTemplate, is_chat_tokenizer
from babygpt.console import console
from babygpt.data.tokenizer import Tokenizer, create_byte_level_bpe, to_json
from babygpt.errors import UserError
from babygpt.nn.huggingface import SUPPORTED, expand_tensors, is_modern
from babygpt.pretrained import Pretrained

# llama.cpp's names of the tensors; {} is the block
TENSORS = {
    "wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm", "lm_head": "output",
    "ln_1": "blk.{}.attn_norm", "attn.c_attn": "blk.{}.attn_qkv", "attn.c_proj": "blk.{}.attn_output",
    "ln_2": "blk.{}.ffn_norm", "mlp.c_fc": "blk.{}.ffn_up", "mlp.c_proj": "blk.{}.ffn_down",
}  # fmt: skip


def check_gguf(model: Pretrained) -> None:
    """Raise a UserError if llama.cpp cannot run the model, or if the package gguf is missing."""
    reason = None
    if is_modern(model.config):
        reason = "llama.cpp does not implement the architecture of the modern recipe"
    elif not _is_byte_level_bpe(model.tokenizer):
        reason = "llama.cpp supports only byte-level BPE with GPT-2's pattern for this architecture"
    if reason:
        raise UserError(f"{model.source} cannot be written as GGUF: {reason}. Omit --gguf.")
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise UserError("--gguf needs the package gguf. Install it with `pip install gguf`.") from None
    if model.config.get("exact_gelu"):
        console.warning("llama.cpp uses an approximation of GELU, so its outputs differ slightly from the model's.")


def _is_byte_level_bpe(tokenizer: Tokenizer) -> bool:
    settings, gpt2 = json.loads(to_json(tokenizer)), json.loads(create_byte_level_bpe().to_str())
    has_gpt2_pattern = all(settings[part] == gpt2[part] for part in ("normalizer", "pre_tokenizer"))
    return settings["model"]["type"] == "BPE" and has_gpt2_pattern and not settings["model"].get("ignore_merges")


def write_gguf(model: Pretrained, out: Path, name: str, dtype: Literal["float32", "float16"]) -> None:
    """Write the weights and the tokenizer of a model that `check_gguf` accepts.

    Vectors and positions are float32 in either case, as in llama.cpp's own conversion.
    """
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(out, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.GPT2])
    writer.add_name(name)
    writer.add_block_count(config["n_layer"])
    writer.add_context_length(config["block_size"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_feed_forward_length(4 * config["n_embd"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(SUPPORTED["layer_norm_epsilon"])
    is_float16 = dtype == "float16"
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if is_float16 else gguf.LlamaFileType.ALL_F32)
    _add_tokenizer(writer, model.tokenizer)

    tensors = expand_tensors(model.tensors, config)
    tensors.setdefault("lm_head.weight", tensors["wte.weight"])
    for key, tensor in tensors.items():
        path, _, kind = key.rpartition(".")  # h.3.attn.c_attn, weight
        layer = path.split(".")[1] if path.startswith("h.") else ""
        gguf_name = TENSORS[path.removeprefix(f"h.{layer}.")].format(layer)
        is_matrix = tensor.dim() == 2 and gguf_name != "position_embd"
        array = tensor.to(torch.float32).numpy().astype(np.float16 if is_float16 and is_matrix else np.float32)
        writer.add_tensor(f"{gguf_name}.{kind}", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer, tokenizer: Tokenizer) -> None:
    import gguf

    settings = json.loads(to_json(tokenizer))
    tokens = settings["model"]["vocab"] | {token["content"]: token["id"] for token in settings["added_tokens"]}
    by_id = sorted(tokens, key=tokens.__getitem__)
    special = {token["content"] for token in settings["added_tokens"] if token["special"]}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in settings["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(by_id)
    types = (gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in by_id)
    writer.add_token_types(list(types))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(tokenizer.eot_id)
    is_chat = is_chat_tokenizer(tokenizer)
    writer.add_eos_token_id(ChatTemplate(tokenizer).im_end_id if is_chat else tokenizer.eot_id)
    if is_chat:
        writer.add_chat_template(JINJA.replace("{% generation %}", "").replace("{% endgeneration %}", ""))
