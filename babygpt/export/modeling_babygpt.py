"""BabyGPT's modern GPT for the library transformers. Every exported modern model contains a copy of this file.

    model = AutoModelForCausalLM.from_pretrained("exported", trust_remote_code=True)

It computes the same logits as `ModernGPT` in BabyGPT's model.py, and its parameters have the same names. Shapes: B
batch, T time, S time including cached tokens, C n_embd, H query heads, K key and value heads, D head size, V
vocabulary.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

# the name of the KV cache in the interface of transformers: past_key_values, or cache in recent versions
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class BabyGPTConfig(PretrainedConfig):
    """The fields of BabyGPT's ModernConfig, and the size of the table of bigram embeddings."""

    model_type = "babygpt"
    keys_to_ignore_at_inference = [CACHE]
    attribute_map = {
        "hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
        "num_key_value_heads": "n_kv_head", "max_position_embeddings": "block_size",
    }  # fmt: skip

    def __init__(
        self, block_size: int = 1024, vocab_size: int = 50257, n_layer: int = 12, n_head: int = 12, n_embd: int = 768,
        n_kv_head: int | None = None, bias: bool = True, tie_head: bool = True, exact_gelu: bool = False,
        rope: bool = False, qk_norm: bool = False, relu2: bool = False, embedding_norm: bool = False,
        value_embeddings: int = 0, num_bigrams: int = 0, partial_key_offset: bool = False, x0_shortcut: bool = False,
        attention_score_factor: float | None = None, document_mask: bool = False, eot_id: int | None = None,
        window: int | None = None, use_cache: bool = True, **kwargs: Any,
    ):  # fmt: skip
        self.block_size, self.vocab_size, self.n_layer, self.n_head = block_size, vocab_size, n_layer, n_head
        self.n_embd, self.n_kv_head, self.bias, self.tie_head = n_embd, n_kv_head or n_head, bias, tie_head
        self.exact_gelu, self.rope, self.qk_norm, self.relu2 = exact_gelu, rope, qk_norm, relu2
        self.embedding_norm = embedding_norm
        self.value_embeddings, self.num_bigrams, self.x0_shortcut = value_embeddings, num_bigrams, x0_shortcut
        self.partial_key_offset, self.attention_score_factor = partial_key_offset, attention_score_factor
        self.document_mask, self.eot_id, self.window, self.use_cache = document_mask, eot_id, window, use_cache
        super().__init__(**kwargs | {"tie_word_embeddings": tie_head})


class SharedInputs:
    """Inputs that all blocks share, from the ids of all tokens, cached ones included, and the attention mask."""

    x0: torch.Tensor  # (B, T, C)
    values: list[torch.Tensor]  # (B, T, K D) per table of value embeddings
    cos_sin: tuple[torch.Tensor, torch.Tensor] | None = None  # (B, 1, T, D / 2) each

    def __init__(self, config: BabyGPTConfig, all_ids: torch.Tensor, T: int, attention_mask: torch.Tensor | None):
        """all_ids is (B, S) int64; attention_mask is (B, S), 0 for padding on the left; the last T tokens are new."""
        S, device = all_ids.size(1), all_ids.device
        is_token = torch.ones_like(all_ids) if attention_mask is None else attention_mask
        positions = (is_token.long().cumsum(1) - 1).clamp(min=0)  # (B, S)
        is_eot = torch.zeros_like(all_ids, dtype=torch.bool)
        if config.document_mask and config.eot_id is not None:
            is_eot = all_ids.eq(config.eot_id)
        self.is_first = (positions == 0) | is_eot  # (B, S), no previous token in the same text
        self.positions = positions[:, -T:]
        previous = F.pad(all_ids + 1, (1, -1)).masked_fill(self.is_first, 0)  # (B, S)
        self.bigrams = (previous * 1_000_003 + all_ids * 7919)[:, -T:]  # before the remainder

        distance = torch.arange(S - T, S, device=device)[:, None] - torch.arange(S, device=device)  # (T, S)
        documents = is_eot.long().cumsum(1)  # (B, S)
        mask = (distance >= 0) & (documents[:, -T:, None] == documents[:, None, :]) & is_token.bool()[:, None, :]
        if config.window is not None:
            mask = mask & (distance < config.window)
        self.mask = (mask | (distance == 0))[:, None]  # (B, 1, T, S); padding attends to itself, to avoid NaN


def norm(x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, (x.size(-1),))


class Attention(nn.Module):
    """ModernAttention of model.py, with another cache: it stores keys before the partial key offset."""

    def __init__(self, config: BabyGPTConfig, layer: int):
        super().__init__()
        self.config, self.layer, self.head_size = config, layer, config.n_embd // config.n_head
        self.c_attn = nn.Linear(config.n_embd, (config.n_head + 2 * config.n_kv_head) * self.head_size, config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, config.bias)
        last = layer - (config.n_layer - config.value_embeddings)
        self.table_index = layer if layer < config.value_embeddings else last
        self.value_lambdas = nn.Parameter(torch.tensor([0.5, 0.5])) if self.table_index >= 0 else None

    def forward(self, x: torch.Tensor, inputs: SharedInputs, cache: DynamicCache | None) -> torch.Tensor:
        config, (B, T, C), D = self.config, x.size(), self.head_size
        q, k, v = self.c_attn(x).split([C, config.n_kv_head * D, config.n_kv_head * D], dim=2)
        q, k, v = (y.view(B, T, -1, D).transpose(1, 2) for y in (q, k, v))  # (B, H or K, T, D)
        if config.qk_norm:
            q, k = norm(q), norm(k)
        if inputs.cos_sin is not None:
            q, k = rotate(q, *inputs.cos_sin), rotate(k, *inputs.cos_sin)
        if self.value_lambdas is not None:
            embedded = inputs.values[self.table_index].view(B, T, -1, D).transpose(1, 2)
            v = self.value_lambdas[0] * v + self.value_lambdas[1] * embedded
        if cache is not None:
            k, v = cache.update(k, v, self.layer)  # (B, K, S, D)
        if config.partial_key_offset:  # the channels that are not rotated are those of the previous token's key
            shifted = F.pad(k, (0, 0, 1, -1)).masked_fill(inputs.is_first[:, None, :, None], 0)
            is_rotated = torch.arange(D, device=x.device) % (D // 2) < D // 4
            k = torch.where(is_rotated, k, shifted)
        scale = (config.attention_score_factor or 1.0) / math.sqrt(D)
        group_size = config.n_head // config.n_kv_head
        k, v = k.repeat_interleave(group_size, dim=1), v.repeat_interleave(group_size, dim=1)  # (B, H, S, D)
        y = F.scaled_dot_product_attention(q, k, v, inputs.mask, scale=scale)
        return self.c_proj(y.transpose(1, 2).flatten(2))  # (B, T, C)


def rotary_cos_sin(positions: torch.Tensor, head_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cosines and sines for positions (B, T), (B, 1, T, D / 2) each. Half of the frequencies are 0."""
    half = head_size // 4
    inv_freq = F.pad((1 / 1024) ** torch.linspace(0, 1, half, device=positions.device), (0, head_size // 2 - half))
    angles = positions[:, None, :, None] * inv_freq
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (d, d + D / 2) of x (B, H, T, D)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1).type_as(x)


class MLP(nn.Module):
    def __init__(self, config: BabyGPTConfig):
        super().__init__()
        self.relu2, self.approximate = config.relu2, "none" if config.exact_gelu else "tanh"
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, config.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.c_fc(x)
        return self.c_proj(F.relu(x).square() if self.relu2 else F.gelu(x, approximate=self.approximate))


class Block(nn.Module):
    """ModernBlock of model.py."""

    def __init__(self, config: BabyGPTConfig, layer: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)
        self.x0_lambdas = nn.Parameter(torch.tensor([1.0, 0.0])) if config.x0_shortcut else None

    def forward(self, x: torch.Tensor, inputs: SharedInputs, cache: DynamicCache | None) -> torch.Tensor:
        if self.x0_lambdas is not None:
            x = self.x0_lambdas[0] * x + self.x0_lambdas[1] * inputs.x0
        x = x + self.attn(self.ln_1(x), inputs, cache)
        return x + self.mlp(self.ln_2(x))


class BabyGPTForCausalLM(PreTrainedModel, GenerationMixin):
    """ModernGPT of model.py, with the interface of transformers."""

    config_class = BabyGPTConfig
    base_model_prefix = ""
    accepts_loss_kwargs = False  # the loss is a mean over the tokens of its batch
    _tied_weights_keys = {"lm_head.weight": "wte.weight"}  # if config.tie_word_embeddings

    def __init__(self, config: BabyGPTConfig):
        super().__init__(config)
        C, D = config.n_embd, config.n_embd // config.n_head
        self.wte = nn.Embedding(config.vocab_size, C)
        self.wpe = None if config.rope else nn.Embedding(config.block_size, C)
        tables = (nn.Embedding(config.vocab_size, config.n_kv_head * D) for _ in range(config.value_embeddings))
        self.vte = nn.ModuleList(tables)
        self.bte = nn.Embedding(config.num_bigrams, C) if config.num_bigrams else None
        self.bigram_lambdas = nn.Parameter(torch.full((config.n_layer,), 0.1)) if config.num_bigrams else None
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(C, bias=config.bias)
        self.lm_head = nn.Linear(C, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.wte

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.wte = value  # type: ignore[assignment]

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings  # type: ignore[assignment]

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        raise ValueError("The vocabulary of a BabyGPT model cannot be resized: its tables and bigrams depend on it.")

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return super().prepare_inputs_for_generation(input_ids, *args, **kwargs) | {"all_ids": input_ids}

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, cache: DynamicCache | None = None,
        past_key_values: DynamicCache | None = None, labels: torch.Tensor | None = None, use_cache: bool | None = None,
        all_ids: torch.Tensor | None = None, logits_to_keep: int | torch.Tensor = 0, return_dict: bool | None = None,
        position_ids: torch.Tensor | None = None, output_hidden_states: bool | None = None,
        output_attentions: bool | None = None, inputs_embeds: torch.Tensor | None = None, **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:  # fmt: skip
        """Return the logits (B, T, V) of token ids (B, T), and the loss, if there are labels (B, T); -100 is ignored.

        With a cache, attention_mask, (B, S), and all_ids cover the cached tokens too. The cache must be a DynamicCache
        that this model has filled, as it remembers the ids. ValueError for what the model does not support.
        """
        unsupported = {
            "inputs_embeds": inputs_embeds is not None, "output_hidden_states": output_hidden_states,
            "output_attentions": output_attentions, "a 4D attention_mask": getattr(attention_mask, "dim", int)() == 4,
        }  # fmt: skip
        if names := [name for name, is_used in unsupported.items() if is_used]:
            raise ValueError(f"BabyGPT's model does not support {' and '.join(names)}.")
        config: BabyGPTConfig = self.config  # type: ignore[assignment]
        T = input_ids.size(1)
        cache = past_key_values if cache is None else cache
        if cache is not None and not isinstance(cache, DynamicCache):
            raise ValueError(f"BabyGPT's model supports only a DynamicCache, not a {type(cache).__name__}.")
        if cache is None and (config.use_cache if use_cache is None else use_cache) and labels is None:
            cache = DynamicCache()
        if all_ids is None:
            cached = getattr(cache, "token_ids", None)
            all_ids = input_ids if cached is None else torch.cat([cached, input_ids], dim=1)
        S = T + (0 if cache is None else cache.get_seq_length())
        if all_ids.size(1) < S:
            raise ValueError("The cache was not filled by this model, so the ids of its tokens are unknown.")
        all_ids = all_ids[:, :S]  # longer if a prompt is prefilled in chunks
        attention_mask = None if attention_mask is None else attention_mask[:, :S]
        if cache is not None:
            cache.token_ids = all_ids  # type: ignore[attr-defined]
        if not config.rope and all_ids.size(1) > config.block_size:
            raise ValueError(f"{all_ids.size(1)} tokens exceed the block size of {config.block_size}")

        inputs = SharedInputs(config, all_ids, T, attention_mask)
        if position_ids is not None:
            is_token = torch.ones_like(input_ids) if attention_mask is None else attention_mask[:, -T:]
            if ((position_ids != inputs.positions) & is_token.bool()).any():
                raise ValueError("BabyGPT's model supports no other position_ids than those of attention_mask.")
        x = self.wte(input_ids)  # (B, T, C)
        if self.wpe is not None:
            x = x + self.wpe(inputs.positions)
        inputs.x0 = x = norm(x) if config.embedding_norm else x
        inputs.values = [table(input_ids) for table in self.vte]
        if config.rope:
            inputs.cos_sin = rotary_cos_sin(inputs.positions, config.n_embd // config.n_head)
        for layer, block in enumerate(self.h):
            if self.bte is not None and self.bigram_lambdas is not None:
                x = x + self.bigram_lambdas[layer] * self.bte(inputs.bigrams.remainder(config.num_bigrams))
            x = block(x, inputs, cache)
        if labels is None:
            x = x[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else x[:, logits_to_keep]
        logits = self.lm_head(self.ln_f(x))  # (B, T, V)

        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        output = CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache})  # type: ignore[arg-type]
        return output.to_tuple() if return_dict is False else output
