"""Extend a model by the special tokens of the chat template."""

import torch
import torch.nn.functional as F

from babygpt.chat.template import chat_tokenizer
from babygpt.nn.cross_entropy import padded_vocab_size
from babygpt.nn.huggingface import is_table
from babygpt.pretrained import Pretrained


def with_chat_tokens(weights: Pretrained) -> Pretrained:
    """Return the weights with the special tokens of the template, or unchanged if the tokenizer has them.

    The rows of new tokens are the means of all others. A table that is full grows to the next multiple of 128.
    ConfigError if the tokenizer is character-level.
    """
    tokenizer, old_size = chat_tokenizer(weights.tokenizer), weights.tokenizer.vocab_size
    new_size = tokenizer.vocab_size
    if new_size == old_size:
        return Pretrained(weights.config, weights.tensors, tokenizer, weights.source, weights.step)
    config, tensors = weights.config | {"vocab_size": new_size}, dict(weights.tensors)
    for name, table in weights.tensors.items():
        if is_table(name):
            new_rows = table[:old_size].mean(dim=0, keepdim=True).expand(new_size - old_size, -1)
            rows = torch.cat([table[:old_size], new_rows])
            tensors[name] = F.pad(rows, (0, 0, 0, padded_vocab_size(new_size) - new_size))
    if config.get("bigram_tables"):  # the hash depends on the size of this table, so it must not grow
        config["num_bigrams"] = len(tensors["bte.weight"])
    return Pretrained(config, tensors, tokenizer, weights.source, weights.step)
