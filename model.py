"""GPT-2, exactly: layer norm, attention, MLP, block, model, and the way from and to Hugging Face's weights.

    >>> model = GPT(GPTConfig(n_layer=6, n_head=6, n_embd=384))
    >>> logits = model(idx)                     # (B, T) int64 -> (B, T, V)
    >>> loss = model(idx, targets)              # summed over the targets that count (not -100)

Shapes: B batch, T time, C n_embd, H heads, K key/value heads, D head size, V vocabulary (padded).
Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; names are Hugging Face's.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from errors import UserError

VOCAB_MULTIPLE = 128  # matrix sides that the hardware likes; 50,257 becomes 50,304


@dataclass(frozen=True)
class GPTConfig:
    """The architecture. The defaults are GPT-2's smallest, 124 M parameters."""

    block_size: int = 1024  # longest context, in tokens
    vocab_size: int = 50257  # entries of the vocabulary; 0: as many as the data set's tokenizer has
    n_layer: int = 12  # blocks
    n_head: int = 12  # attention heads
    n_embd: int = 768  # width of the residual stream
    n_kv_head: int | None = None  # key and value heads, shared by groups of heads (none: one a head)
    dropout: float = 0.0  # share dropped of embeddings, attention weights and each branch's output
    bias: bool = True  # biases in the linear layers and layer norms
    tie_head: bool = True  # the head is the token embedding, transposed

    @property
    def padded_vocab_size(self) -> int:
        return math.ceil(self.vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def kv_heads(self) -> int:
        return self.n_kv_head or self.n_head

    @property
    def head_size(self) -> int:
        return self.n_embd // self.n_head


class KVCache:
    """Keys and values of the tokens seen so far, for a batch of B sequences of up to `block_size` tokens."""

    def __init__(self, config: GPTConfig, batch_size: int, device: torch.device, dtype: torch.dtype):
        shape = (config.n_layer, batch_size, config.kv_heads, config.block_size, config.head_size)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0  # tokens in it

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Puts k, v (B, K, T, D) of new tokens behind the old ones; returns all, (B, K, length + T, D)."""
        end = self.length + k.size(2)
        self.k[layer, :, :, self.length : end] = k
        self.v[layer, :, :, self.length : end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]


def plain_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention written out; q (B, H, T, D), k and v (B, K, S, D), the T queries being the last of S.

    What `attention` computes with a fused kernel; the tests hold the two equal.
    """
    groups = q.size(1) // k.size(1)
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)  # (B, H, S, D)
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))  # (B, H, T, S)
    T, S = scores.shape[-2:]
    future = torch.ones(T, S, dtype=torch.bool, device=q.device).triu(S - T + 1)
    weights = scores.masked_fill(future, float("-inf")).softmax(dim=-1)
    return weights @ v  # (B, H, T, D)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout: float = 0.0) -> torch.Tensor:
    """Causal attention by PyTorch's fused kernels; shapes as in `plain_attention`."""
    T, S = q.size(2), k.size(2)
    mask = None
    if 1 < T < S:  # several new tokens behind a filled cache; is_causal would count from the wrong corner
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    grouped = q.size(1) != k.size(1)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=T > 1 and mask is None, dropout_p=dropout, enable_gqa=grouped
    )


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.config, self.layer = config, layer
        D = config.head_size
        self.c_attn = nn.Linear(config.n_embd, (config.n_head + 2 * config.kv_heads) * D, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: torch.Tensor, cache: KVCache | None) -> torch.Tensor:
        B, T, C = x.size()
        D = self.config.head_size
        # of the C + 2 K D outputs, the first C are queries, then keys, then values
        q, k, v = self.c_attn(x).split([C, self.config.kv_heads * D, self.config.kv_heads * D], dim=2)
        q = q.view(B, T, -1, D).transpose(1, 2)  # (B, H, T, D)
        k = k.view(B, T, -1, D).transpose(1, 2)  # (B, K, T, D)
        v = v.view(B, T, -1, D).transpose(1, 2)  # (B, K, T, D)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, K, S, D)
        y = attention(q, k, v, self.config.dropout if self.training else 0.0)  # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, C)
        return F.dropout(self.c_proj(y), self.config.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.gelu(self.c_fc(x), approximate="tanh")  # (B, T, 4 C)
        return F.dropout(self.c_proj(x), self.config.dropout, self.training)  # (B, T, C)


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, cache: KVCache | None) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        if config.tie_head:
            self.lm_head.weight = self.wte.weight
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """GPT-2's: normal with deviation 0.02, biases zero, layer norms one. What adds to the residual stream
        is scaled down by the root of its 2 n_layer contributions (section 2.3 of the paper)."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif name.split(".")[-2].startswith("ln_"):
                parameter.fill_(1.0)
            else:
                residual = name.endswith("c_proj.weight")
                parameter.normal_(0.0, 0.02 / math.sqrt(2 * self.config.n_layer) if residual else 0.02)

    def forward(
        self, idx: torch.Tensor, targets: torch.Tensor | None = None, cache: KVCache | None = None
    ) -> torch.Tensor:
        """Token ids (B, T) int64 to logits (B, T, V), or with targets (B, T) int64 to their summed loss, float32.

        Targets of -100 don't count. With a cache, idx are the tokens behind the ones it holds.
        """
        logits = self.logits(self.hidden(idx, cache))
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100, reduction="sum")

    def hidden(self, idx: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """Token ids (B, T) to what the head reads, (B, T, C)."""
        T, start = idx.size(1), cache.length if cache is not None else 0
        if start + T > self.config.block_size:
            raise ValueError(f"{start + T} tokens are more than the block size of {self.config.block_size}")
        positions = torch.arange(start, start + T, device=idx.device)
        x = self.wte(idx) + self.wpe(positions)  # (B, T, C)
        x = F.dropout(x, self.config.dropout, self.training)
        for block in self.h:
            x = block(x, cache)
        if cache is not None:
            cache.length += T
        return self.ln_f(x)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """(..., C) to logits (..., V); the entries that only pad the vocabulary are -inf, so they get no
        probability wherever logits are sampled, scored or enter a loss."""
        logits = self.lm_head(x)
        logits[..., self.config.vocab_size :] = float("-inf")
        return logits

    def num_params(self) -> int:
        """Parameters, the padding of the vocabulary left out: 124,439,808 for GPT-2's smallest."""
        tables = 1 if self.config.tie_head else 2
        padding = (self.config.padded_vocab_size - self.config.vocab_size) * self.config.n_embd * tables
        return sum(parameter.numel() for parameter in self.parameters()) - padding

    def flops_per_token(self) -> int:
        """Operations to train on one token, forward and backward.

        6 a weight of every matrix product (PaLM paper, appendix B: 2 forward, 4 backward), and 12 L T C for
        attention's two products over the context, counted whole as is usual: 854.7 M for GPT-2 at T = 1024.
        """
        matrices = sum(module.weight.numel() for module in self.modules() if isinstance(module, nn.Linear))
        config = self.config
        return 6 * matrices + 12 * config.n_layer * config.block_size * config.n_embd


# ---------------------------------------------------------------------------------------------------------
# Hugging Face's GPT-2 weights

# its Conv1D keeps these matrices transposed
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def gpt2_config(config_json: Path) -> GPTConfig:
    """The architecture in a `config.json` of Hugging Face's GPT-2; UserError where ours differs from it."""
    values = json.loads(config_json.read_text(encoding="utf-8"))
    if values.get("model_type") != "gpt2" or values.get("activation_function", "gelu_new") != "gelu_new":
        raise UserError(f"{config_json} is no GPT-2: model_type is {values.get('model_type')!r}.")
    return GPTConfig(
        block_size=values["n_positions"], vocab_size=values["vocab_size"], n_layer=values["n_layer"],
        n_head=values["n_head"], n_embd=values["n_embd"], tie_head=values.get("tie_word_embeddings", True),
    )  # fmt: skip


def from_gpt2(state: dict[str, torch.Tensor], config: GPTConfig) -> GPT:
    """A model from Hugging Face's GPT-2 tensors. A smaller block size keeps the first positions."""
    model = GPT(config)
    ours = model.state_dict()
    loaded = set()
    for name, tensor in state.items():
        name = name.removeprefix("transformer.")
        if name.endswith((".attn.bias", ".attn.masked_bias")):
            continue  # the causal mask, not a parameter
        if name not in ours:
            raise UserError(f"these GPT-2 weights have a tensor {name} that the model has not.")
        tensor = tensor.t() if name.endswith(TRANSPOSED) else tensor
        target = ours[name]
        if name in ("wte.weight", "lm_head.weight"):
            target.zero_()
            target = target[: config.vocab_size]  # the rows below pad
        elif name == "wpe.weight":
            tensor = tensor[: config.block_size]
        if target.shape != tensor.shape:
            raise UserError(f"{name} is {tuple(tensor.shape)} in the weights, {tuple(target.shape)} in the model.")
        target.copy_(tensor)
        loaded.add(name)
    missing = set(ours) - loaded - ({"lm_head.weight"} if config.tie_head else set())
    if missing:
        raise UserError(f"these GPT-2 weights lack {', '.join(sorted(missing))}.")
    return model


def to_gpt2(model: GPT) -> dict[str, torch.Tensor]:
    """The model's tensors under Hugging Face's GPT-2 names and shapes, padding cut off."""
    if model.config.kv_heads != model.config.n_head or not model.config.bias:
        raise UserError("Hugging Face's GPT-2 has one key and value head a head, and biases: this model can't be told.")
    state = {}
    for name, tensor in model.state_dict().items():
        tensor = tensor.t() if name.endswith(TRANSPOSED) else tensor
        if name in ("wte.weight", "lm_head.weight"):
            tensor = tensor[: model.config.vocab_size]
        state[name if name == "lm_head.weight" else f"transformer.{name}"] = tensor.contiguous()
    return state
