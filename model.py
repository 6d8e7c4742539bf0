"""GPT-2, followed by a modern GPT with the architecture changes of the modded-nanogpt speed records.

    >>> model = GPT(GPTConfig(n_layer=6, n_head=6, n_embd=384))
    >>> logits = model(idx)                      # (B, T) int64 -> (B, T, V)
    >>> loss = model(idx, targets)               # mean loss; targets of -100 are ignored
    >>> model = GPT.from_pretrained("out/gpt2")  # or a checkpoint, "gpt2", a Hugging Face directory
    >>> print(model.generate("Once upon a time", max_new_tokens=50))

Shapes: B batch, T time, C n_embd, H query heads, K key and value heads, D head size, V padded vocabulary, L layers, and
S the number of keys, which with a KV cache is more than T. Parameter names are those of Hugging Face's GPT2Model.

References: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; for the modern GPT,
https://github.com/KellerJordan/modded-nanogpt and the ablation in results/recipe.
"""

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from annotated_types import Ge, Lt
from torch.utils.checkpoint import checkpoint as activation_checkpoint

from babygpt.constraints import NonNegative, Positive, PositiveFloat, metavar, violations
from babygpt.data.tokenizer import Tokenizer
from babygpt.nn.attention import (
    KVCache,
    Mask,
    MaskRule,
    PackedRows,
    apply_rotary_emb,
    attention,
    attention_mask,
    rotary_cos_sin,
    token_positions,
)
from babygpt.nn.bigram import BigramEmbedding
from babygpt.nn.cross_entropy import IGNORE_INDEX, linear_cross_entropy, padded_vocab_size
from babygpt.nn.generation import SamplingParams, generate
from babygpt.nn.shift import Shift, offset_keys
from babygpt.pretrained import read_pretrained

# ---------------------------------------------------------------------------------------------------------
# GPT-2


DropoutRate = Annotated[float, Ge(0), Lt(1)]


@dataclass(frozen=True)
class GPTConfig:
    """Architecture. The defaults are those of the smallest GPT-2 (124M)."""

    block_size: Positive = 1024  # context length, in tokens
    vocab_size: NonNegative = 50257  # vocabulary size; 0: that of the dataset
    n_layer: Positive = 12  # number of blocks
    n_head: Positive = 12  # number of attention heads
    n_embd: Positive = 768  # width of the residual stream
    # number of key and value heads (grouped-query attention)
    n_kv_head: Annotated[Positive | None, metavar("N", "n_head")] = None
    dropout: DropoutRate = 0.0  # dropout probability of embeddings, attention weights and residual branches
    bias: bool = True  # use biases in linear layers and layer norms
    tie_head: bool = True  # tie the weights of lm_head and wte
    exact_gelu: bool = False  # compute GELU exactly, as nanoGPT does, instead of GPT-2's tanh approximation

    @property
    def padded_vocab_size(self) -> int:
        return padded_vocab_size(self.vocab_size)

    @property
    def kv_heads(self) -> int:
        return self.n_kv_head or self.n_head

    @property
    def head_size(self) -> int:
        return self.n_embd // self.n_head

    @property
    def mask_rule(self) -> MaskRule:
        """Limits of attention besides causality; GPT-2 has none."""
        return MaskRule()


class CausalSelfAttention(nn.Module):
    """Causal attention, or attention under `mask` (babygpt/nn/attention.py)."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.config, self.layer = config, layer
        # fused projections of queries, keys and values
        self.c_attn = nn.Linear(config.n_embd, (config.n_head + 2 * config.kv_heads) * config.head_size, config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, config.bias)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor, mask: Mask = None, cache: KVCache | None = None) -> torch.Tensor:
        q, k, v = self.qkv(x)
        return self.attend(q, k, v, mask, cache)  # (B, T, C)

    def qkv(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Project x (B, T, C) to queries (B, H, T, D), keys and values (B, K, T, D)."""
        B, T, C = x.size()
        D, kv_width = self.config.head_size, self.config.kv_heads * self.config.head_size
        q, k, v = self.c_attn(x).split([C, kv_width, kv_width], dim=2)
        q = q.view(B, T, -1, D).transpose(1, 2)  # (B, H, T, D)
        k = k.view(B, T, -1, D).transpose(1, 2)  # (B, K, T, D)
        v = v.view(B, T, -1, D).transpose(1, 2)  # (B, K, T, D)
        return q, k, v

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask, cache: KVCache | None,
        scale: float | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Attend, project and return (B, T, C). A `scale` of None is 1 / sqrt(D)."""
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # (B, K, S, D), in the cache's dtype
            q = q.type_as(k)
        y = attention(q, k, v, mask, scale, self.config.dropout if self.training else 0.0)  # (B, H, T, D)
        y = y.transpose(1, 2).flatten(2)  # (B, T, C), the heads concatenated
        return self.drop(self.c_proj(y))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, config.bias)
        self.drop = nn.Dropout(config.dropout)
        self.approximate = "none" if config.exact_gelu else "tanh"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.activation(self.c_fc(x))  # (B, T, 4 C)
        return self.drop(self.c_proj(x))  # (B, T, C)

    def activation(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(x, approximate=self.approximate)


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, mask: Mask = None, cache: KVCache | None = None) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x), mask, cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    # set by `from_pretrained`
    tokenizer: Tokenizer
    source: str  # path or name that the weights were loaded from
    step: int | None  # training step of the checkpoint; None for external weights

    # set by train.py: they change speed and memory, not the architecture
    activation_checkpointing = False  # recompute each block's activations in the backward pass
    bf16_activations = False  # under autocast, keep the residual stream in bfloat16 instead of float32

    def __init__(self, config: GPTConfig):
        super().__init__()
        if isinstance(config, ModernConfig):
            raise TypeError("GPT is the classic GPT-2. Use build_model(config) for a ModernConfig.")
        self.config = config
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        if config.tie_head:
            self.lm_head.weight = self.wte.weight  # one parameter, named wte.weight
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        for name, parameter in self.named_parameters():  # keep the order: it determines the random numbers
            self.init_parameter(name, parameter)

    def init_parameter(self, name: str, parameter: nn.Parameter) -> None:
        """GPT-2's initialization: weights N(0, 0.02), biases 0, gains of layer norms 1.

        The 2 n_layer projections into the residual stream are scaled by 1 / sqrt(2 n_layer) (section 2.3 of the paper).
        """
        if name.endswith("bias"):
            parameter.zero_()
        elif name.split(".")[-2].startswith("ln_"):
            parameter.fill_(1.0)
        elif name.endswith("c_proj.weight"):
            parameter.normal_(0.0, 0.02 / math.sqrt(2 * self.config.n_layer))
        else:
            parameter.normal_(0.0, 0.02)

    def forward(
        self, idx: torch.Tensor, targets: torch.Tensor | None = None, *, cache: KVCache | None = None,
        packed: PackedRows | None = None, reduction: Literal["mean", "sum", "none"] = "mean",
    ) -> torch.Tensor:  # fmt: skip
        """Return the logits (B, T, V) of token ids idx (B, T) int64, or the loss, () float32, of targets (B, T) int64.

        The loss is the mean cross entropy, or its sum, for gradient accumulation, or that of each target, (B, T), which
        needs more memory. Targets of -100 are ignored. For `cache` and `packed`, see `hidden`.
        """
        x = self.hidden(idx, cache, packed)  # (B, T, C)
        if targets is None:
            return self.logits(x)
        if reduction == "none":
            counted = targets != IGNORE_INDEX
            losses = F.cross_entropy(self.logits(x[counted]).float(), targets[counted], reduction="none")
            return torch.zeros(targets.shape, device=x.device).masked_scatter(counted, losses)  # (B, T)
        loss = self.summed_loss(x.flatten(0, 1), targets.flatten())
        return loss if reduction == "sum" else loss / (targets != IGNORE_INDEX).sum()

    def hidden(self, idx: torch.Tensor, cache: KVCache | None = None, packed: PackedRows | None = None) -> torch.Tensor:
        """Return the final hidden states, (B, T, C), of token ids idx (B, T) int64.

        With a cache, idx continues the cached tokens. Without one, each row is one text, from position 0 on, unless
        `packed` describes the texts of each row.
        """
        positions = packed.positions if packed else token_positions(idx, cache, self.config.block_size)  # (B or 1, T)
        attn_mask = attention_mask(idx, positions, cache, packed)
        x = self.drop(self.wte(idx) + self.wpe(positions))  # (B, T, C)
        x = self.to_activation_dtype(x)
        for block in self.h:
            x = self.run_block(block, x, attn_mask, cache)
        if cache is not None:
            cache.length += idx.size(1)
        return self.ln_f(x)

    def to_activation_dtype(self, x: torch.Tensor) -> torch.Tensor:
        if self.bf16_activations and torch.is_autocast_enabled(x.device.type):
            return x.to(torch.get_autocast_dtype(x.device.type))
        return x

    def run_block(self, block: nn.Module, *inputs: Any) -> torch.Tensor:
        if self.activation_checkpointing and self.training:
            return activation_checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits (..., V) of hidden states (..., C), -inf for the entries that pad the vocabulary."""
        logits = self.lm_head(x)
        logits[..., self.config.vocab_size :] = float("-inf")
        return logits

    def summed_loss(self, x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the summed cross entropy, () float32, of hidden states (N, C) and targets (N,), head included."""
        return linear_cross_entropy(x, self.lm_head.weight, targets, self.config.vocab_size)

    def generate(self, prompt: str, **params: Any) -> str:
        """Return `prompt` and a continuation. Needs a `tokenizer`; keyword arguments are those of SamplingParams."""
        sampling = SamplingParams(**params)
        if problems := violations(sampling, format_name=str):
            raise ValueError("; ".join(problems))
        tokens = [self.tokenizer.eot_id, *self.tokenizer.encode(prompt)]  # every document starts with EOT
        steps = generate(self, [tokens], sampling, self.tokenizer.eot_id)
        return prompt + self.tokenizer.decode([token for (token,) in steps if token is not None])  # None after EOT

    def make_cache(self, batch_size: int, dtype: torch.dtype, starts: torch.Tensor | None = None) -> KVCache:
        """Return an empty cache for sequences of up to block_size tokens; `starts` as in KVCache."""
        config = self.config
        shape = (batch_size, config.kv_heads, config.block_size, config.head_size)
        return KVCache(config.n_layer, shape, self.wte.weight.device, dtype, starts)

    def num_params(self) -> int:
        """Return the number of parameters without the padding of the vocabulary: 124,439,808 for the smallest GPT-2."""
        tables = [p for name, p in self.named_parameters() if name.startswith(("wte.", "vte.", "lm_head."))]
        padding = (self.config.padded_vocab_size - self.config.vocab_size) * sum(table.size(1) for table in tables)
        return sum(parameter.numel() for parameter in self.parameters()) - padding

    def flops_per_token(self) -> int:
        """Return the FLOPs of training on one token: 854.7M for the smallest GPT-2.

        6 per weight of each matrix product, including padding (PaLM paper, appendix B: 2 forward, 4 backward), and
        12 L T C for the two products of attention, counted over the full context or window, without the causal mask.
        """
        num_matrix_params = sum(module.weight.numel() for module in self.modules() if isinstance(module, nn.Linear))
        context = self.config.mask_rule.window or self.config.block_size
        return 6 * num_matrix_params + 12 * self.config.n_layer * context * self.config.n_embd

    @staticmethod
    def from_pretrained(spec: str | Path, device: torch.device | str = "cpu") -> "GPT":
        """Return a model in eval mode, with its `tokenizer`, `source` and `step`.

        `spec` is a run directory (its latest checkpoint), a checkpoint directory, a Hugging Face GPT-2 directory, or a
        name such as "gpt2-xl", which is downloaded once to data/. Raises UserError if there is no intact model.
        """
        pretrained = read_pretrained(spec)
        model = pretrained.build(lambda values: build_model(config_from_dict(values)))  # with the weights
        model.tokenizer, model.source, model.step = pretrained.tokenizer, pretrained.source, pretrained.step
        return model.to(device).eval()


# ---------------------------------------------------------------------------------------------------------
# the modern GPT


@dataclass(frozen=True)
class ModernConfig(GPTConfig):
    """Architecture: GPT-2 with optional improvements, most of which the preset modern turns on."""

    rope: bool = False  # rotary embeddings (arXiv:2104.09864) instead of learned position embeddings
    qk_norm: bool = False  # RMS norm of queries and keys (arXiv:2010.04245)
    relu2: bool = False  # squared ReLU instead of GELU (arXiv:2109.08668)
    embedding_norm: bool = False  # RMS norm (arXiv:1910.07467) after the embedding
    # number of value embeddings; blocks i and n_layer - value_embeddings + i use embedding i
    value_embeddings: NonNegative = 0
    # size of the table of bigram embeddings, added to the input of each block, in multiples of the vocabulary; 0: off
    bigram_tables: NonNegative = 0
    num_bigrams: NonNegative = 0  # the same size in entries, if the vocabulary has grown since; 0: bigram_tables
    partial_key_offset: bool = False  # half of each key's channels are those of the previous token's key
    x0_shortcut: bool = False  # mix the embedding, x0, into the input of each block
    # factor by which attention scores are multiplied, in addition to 1 / sqrt(head size)
    attention_score_factor: Annotated[PositiveFloat | None, metavar("FACTOR", "1")] = None
    document_mask: bool = False  # attend within documents only; a document starts at each eot_id
    eot_id: Annotated[int | None, metavar("ID", "that of the dataset")] = None  # end-of-text id, for document_mask
    # size of the sliding attention window, including the current token
    window: Annotated[Positive | None, metavar("TOKENS", "all tokens")] = None

    @property
    def mask_rule(self) -> MaskRule:
        window = self.window if self.window is not None and self.window < self.block_size else None
        return MaskRule(window, self.eot_id if self.document_mask else None)


def norm(x: torch.Tensor) -> torch.Tensor:
    """RMS norm of x (..., C) without parameters."""
    return F.rms_norm(x, (x.size(-1),))


@dataclass
class SharedInputs:
    """Inputs that all blocks of a forward pass share."""

    mask: Mask
    cache: KVCache | None
    shift: Shift  # by one token
    x0: torch.Tensor  # (B, T, C), the input of the first block
    cos_sin: tuple[torch.Tensor, torch.Tensor] | None  # of rotary embeddings, (B or 1, 1, T, D / 2) each
    value_embeds: list[torch.Tensor]  # (B, T, K D) per table


class ModernAttention(CausalSelfAttention):
    """Attention with optional QK norm, rotary embeddings, partial key offset and value embeddings."""

    def __init__(self, config: ModernConfig, layer: int):
        super().__init__(config, layer)
        self.qk_norm, self.scale = config.qk_norm, (config.attention_score_factor or 1.0) / math.sqrt(config.head_size)
        self.partial_key_offset = config.partial_key_offset
        # index of this block's table of value embeddings, negative if it has none
        index_in_last_blocks = layer - (config.n_layer - config.value_embeddings)
        self.table_index = layer if layer < config.value_embeddings else index_in_last_blocks
        # mixing weights: the block's own values, the value embedding
        self.value_lambdas = nn.Parameter(torch.tensor([0.5, 0.5])) if self.table_index >= 0 else None

    def forward(self, x: torch.Tensor, shared: SharedInputs) -> torch.Tensor:  # type: ignore[override]
        q, k, v = self.qkv(x)
        if self.qk_norm:
            q, k = norm(q).type_as(v), norm(k).type_as(v)  # autocast may return float32
        if shared.cos_sin is not None:
            q, k = apply_rotary_emb(q, shared.cos_sin), apply_rotary_emb(k, shared.cos_sin)
        if self.partial_key_offset:
            last = None if shared.cache is None else shared.cache.last_keys[self.layer]
            k = offset_keys(k, shared.shift, last)  # (B, K, T, D)
        if self.value_lambdas is not None:
            B, K, T, D = v.size()
            embedded = shared.value_embeds[self.table_index].view(B, T, K, D).transpose(1, 2)  # (B, K, T, D)
            v = (self.value_lambdas[0] * v + self.value_lambdas[1] * embedded).type_as(v)
        return self.attend(q, k, v, shared.mask, shared.cache, self.scale)  # (B, T, C)


class ModernMLP(MLP):
    def __init__(self, config: ModernConfig):
        super().__init__(config)
        self.relu2 = config.relu2

    def activation(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x).square() if self.relu2 else super().activation(x)


class ModernBlock(nn.Module):
    """A block with optional x0 shortcut: its input is a learned mix of the residual stream and x0."""

    def __init__(self, config: ModernConfig, layer: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = ModernAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = ModernMLP(config)
        # mixing weights: x, x0
        self.x0_lambdas = nn.Parameter(torch.tensor([1.0, 0.0])) if config.x0_shortcut else None

    def forward(self, x: torch.Tensor, shared: SharedInputs) -> torch.Tensor:
        if self.x0_lambdas is not None:
            x = self.x0_lambdas[0] * x + self.x0_lambdas[1] * shared.x0
        x = x + self.attn(self.ln_1(x), shared)
        return x + self.mlp(self.ln_2(x))


class ModernGPT(GPT):
    """A GPT with the switches of ModernConfig."""

    config: ModernConfig

    def __init__(self, config: ModernConfig):
        nn.Module.__init__(self)  # not GPT's: the modules differ, and their order determines the random numbers
        if config.document_mask and config.eot_id is None:
            raise ValueError("document_mask requires eot_id, the id of the token that precedes each document.")
        self.config = config
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
        if not config.rope:
            self.wpe = nn.Embedding(config.block_size, config.n_embd)
        table_shape = config.padded_vocab_size, config.kv_heads * config.head_size
        self.vte = nn.ModuleList(nn.Embedding(*table_shape) for _ in range(config.value_embeddings))
        if config.bigram_tables:
            num_bigrams = config.num_bigrams or config.bigram_tables * config.padded_vocab_size
            self.bte = BigramEmbedding(num_bigrams, config.n_embd)
            self.bigram_lambdas = nn.Parameter(torch.full((config.n_layer,), 0.1))
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(ModernBlock(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        if config.tie_head:
            self.lm_head.weight = self.wte.weight
        self.init_weights()

    def init_parameter(self, name: str, parameter: nn.Parameter) -> None:
        """GPT-2's initialization, except for some embeddings and partial_key_offset."""
        config = self.config
        normalized = config.embedding_norm and not config.tie_head and name == "wte.weight"
        if name.endswith("lambdas"):
            return  # set in the constructor
        if name == "bte.weight":
            parameter.zero_()
        elif normalized or name.startswith("vte."):
            parameter.normal_(0.0, 1.0)
        else:
            super().init_parameter(name, parameter)
        if config.partial_key_offset and name.endswith("c_attn.weight"):
            # copy the queries to the keys, so that at first a query matches similar tokens
            q, rest = parameter.split([config.n_embd, len(parameter) - config.n_embd])  # rest: keys, values
            first_heads = q.view(config.kv_heads, -1, *q.shape[1:])[:, : config.head_size]  # of each group, (K, D, C)
            rest[: len(rest) // 2] = first_heads.flatten(0, 1)

    def hidden(self, idx: torch.Tensor, cache: KVCache | None = None, packed: PackedRows | None = None) -> torch.Tensor:
        config = self.config
        positions = packed.positions if packed else token_positions(idx, cache, config.block_size)  # (B or 1, T)
        can_use_flex = config.head_size >= 16 and not (config.dropout and self.training)  # FlexAttention's limits
        attn_mask = attention_mask(idx, positions, cache, packed, config.mask_rule, can_use_flex)
        shift = Shift.from_tokens(idx, positions, packed, config.mask_rule.eot_id)
        x = self.wte(idx)  # (B, T, C)
        if not config.rope:
            x = x + self.wpe(positions)
        x = self.drop(x)
        if config.embedding_norm:
            x = norm(x)
        x = self.to_activation_dtype(x)
        value_embeds = [self.to_activation_dtype(table(idx)) for table in self.vte]
        if config.bigram_tables:
            bigram_embeds = self.to_activation_dtype(self.bte(idx, shift, None if cache is None else cache.last_token))
        cos_sin = rotary_cos_sin(positions, config.head_size) if config.rope else None
        shared = SharedInputs(attn_mask, cache, shift, x, cos_sin, value_embeds)
        for layer, block in enumerate(self.h):
            if config.bigram_tables:
                x = x + self.bigram_lambdas[layer] * bigram_embeds
            x = self.run_block(block, x, shared)
        if cache is not None:
            cache.length += idx.size(1)
        return self.ln_f(x)


# ---------------------------------------------------------------------------------------------------------
# either model


def build_model(config: GPTConfig) -> GPT:
    return ModernGPT(config) if isinstance(config, ModernConfig) else GPT(config)


def config_from_dict(values: dict[str, Any]) -> GPTConfig:
    """Return a GPTConfig, or a ModernConfig if `values` has fields of it. Raises TypeError for an unknown field."""
    gpt_fields = {field.name for field in fields(GPTConfig)}
    return GPTConfig(**values) if values.keys() <= gpt_fields else ModernConfig(**values)
