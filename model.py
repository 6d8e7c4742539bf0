"""GPT-2, exactly, and what was found since, a switch each; and models from any weights.

    >>> model = GPT(GPTConfig(n_layer=6, n_head=6, n_embd=384))
    >>> logits = model(idx)                     # (B, T) int64 -> (B, T, V)
    >>> loss = model(idx, targets)              # summed over the targets that count (not -100)
    >>> model = GPT.from_pretrained("out/gpt2")  # or a checkpoint, "gpt2", a Hugging Face directory

Shapes: B batch, T time, C n_embd, H heads, K key/value heads, D head size, V vocabulary (padded); S is the time of
keys and values, T or more with a cache.
Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; names are Hugging Face's. The switches are
those of the public speed records (KellerJordan/modded-nanogpt); what each is worth stands in results/recipe.
"""

import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.utils.checkpoint import checkpoint as compute_again

from babygpt import hub
from babygpt.data.tokenizer import Tokenizer, is_gpt2, load_tokenizer
from babygpt.errors import ConfigError, UserError
from babygpt.nn import huggingface
from babygpt.nn.attention import KVCache, attention, attention_backend, rotate, rotation
from babygpt.nn.cross_entropy import linear_cross_entropy, softcapped
from babygpt.training import checkpoint

VOCAB_MULTIPLE = 128  # matrix sides that the hardware likes; 50,257 becomes 50,304
FLEX_DEVICES = ("cuda",)  # where compiled masks are FlexAttention's
HUB_MODELS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")


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
    # found since GPT-2; all of it off is GPT-2
    rope: bool = False  # rotary positions (arXiv:2104.09864) in place of learned ones
    qk_norm: bool = False  # each query and key has length sqrt(D)
    relu2: bool = False  # the square of ReLU in place of GELU (arXiv:2109.08668)
    rms_norm: bool = False  # RMS norms without parameters in place of layer norms
    embedding_norm: bool = False  # a norm behind the embedding too
    zero_init: bool = False  # what adds to the residual stream, and an untied head, begin at zero
    value_embeddings: int = 0  # tables of values by token, mixed into those of the first and last so many blocks
    x0_shortcut: bool = False  # every block begins with a mix of the stream and the embedding
    unet: bool = False  # the first half of the blocks hands its outputs to the second, last to first
    logit_softcap: float | None = None  # logits are c tanh(logits / c) (Gemma 2, arXiv:2408.00118)
    attention_scale: float | None = None  # of query times key [1 / sqrt(D)]
    document_mask: bool = False  # attention stays inside documents; each begins with eot_id
    eot_id: int | None = None  # the tokenizer's end of text [from the data set]
    window: int | None = None  # tokens that attention looks back, itself included [all]

    @property
    def padded_vocab_size(self) -> int:
        return math.ceil(self.vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def kv_heads(self) -> int:
        return self.n_kv_head or self.n_head

    @property
    def head_size(self) -> int:
        return self.n_embd // self.n_head


def norm(x: torch.Tensor) -> torch.Tensor:
    """(..., C) divided by its root mean square (arXiv:1910.07467), without parameters."""
    return F.rms_norm(x, (x.size(-1),))


def make_norm(config: GPTConfig) -> nn.Module:
    if config.rms_norm:
        return nn.RMSNorm(config.n_embd, elementwise_affine=False)
    return nn.LayerNorm(config.n_embd, bias=config.bias)


@dataclass
class Shared:
    """What the blocks of one forward pass have in common."""

    cache: KVCache | None
    rotation: tuple[torch.Tensor, torch.Tensor] | None  # with rope
    mask: "torch.Tensor | BlockMask | None"  # who sees whom; None: every token sees itself and all before
    x0: torch.Tensor  # (B, T, C), what the first block is given
    values: list[torch.Tensor]  # (B, T, K D) each, of the tokens: the value embeddings


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.config, self.layer = config, layer
        D = config.head_size
        self.c_attn = nn.Linear(config.n_embd, (config.n_head + 2 * config.kv_heads) * D, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        from_end = config.n_layer - config.value_embeddings
        self.table = layer if layer < config.value_embeddings else layer - from_end  # below 0: none
        # shares of the block's own values and of the tokens'
        self.v_mix = nn.Parameter(torch.tensor([0.5, 0.5])) if self.table >= 0 else None

    def forward(self, x: torch.Tensor, shared: Shared) -> torch.Tensor:
        config = self.config
        B, T, C = x.size()
        D = config.head_size
        # of the C + 2 K D outputs, the first C are queries, then keys, then values
        q, k, v = self.c_attn(x).split([C, config.kv_heads * D, config.kv_heads * D], dim=2)
        q = q.view(B, T, -1, D).transpose(1, 2)  # (B, H, T, D)
        k = k.view(B, T, -1, D).transpose(1, 2)  # (B, K, T, D)
        v = v.view(B, T, -1, D).transpose(1, 2)  # (B, K, T, D)
        if config.qk_norm:
            q, k = norm(q).type_as(v), norm(k).type_as(v)  # autocast may have made them float32
        if shared.rotation is not None:
            q, k = rotate(q, *shared.rotation), rotate(k, *shared.rotation)
        if self.v_mix is not None:
            of_tokens = shared.values[self.table].view(B, T, -1, D).transpose(1, 2)
            v = (self.v_mix[0] * v + self.v_mix[1] * of_tokens).type_as(v)
        if shared.cache is not None:
            k, v = shared.cache.append(self.layer, k, v)  # (B, K, S, D), in the cache's dtype
            q = q.type_as(k)
        dropout = config.dropout if self.training else 0.0
        y = attention(q, k, v, shared.mask, config.attention_scale, dropout)  # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, C)
        return F.dropout(self.c_proj(y), config.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.c_fc(x)  # (B, T, 4 C)
        x = F.relu(x).square() if self.config.relu2 else F.gelu(x, approximate="tanh")
        return F.dropout(self.c_proj(x), self.config.dropout, self.training)  # (B, T, C)


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.ln_1 = make_norm(config)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = make_norm(config)
        self.mlp = MLP(config)
        # shares of the stream and of its beginning
        self.x_mix = nn.Parameter(torch.tensor([1.0, 0.0])) if config.x0_shortcut else None

    def forward(self, x: torch.Tensor, shared: Shared) -> torch.Tensor:
        if self.x_mix is not None:
            x = self.x_mix[0] * x + self.x_mix[1] * shared.x0
        x = x + self.attn(self.ln_1(x), shared)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    # set by `from_pretrained` only
    tokenizer: Tokenizer
    source: str
    step: int | None  # of the run; None for weights that come from elsewhere

    def __init__(self, config: GPTConfig):
        super().__init__()
        if config.document_mask and config.eot_id is None:
            raise ValueError("document_mask needs to know eot_id, the token that documents begin with")
        self.config = config
        self.recompute = False  # the blocks' activations in the backward pass, rather than to keep them
        self.bf16_activations = False  # under autocast, also the residual stream is bfloat16, not only products
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
        if not config.rope:
            self.wpe = nn.Embedding(config.block_size, config.n_embd)
        width = config.kv_heads * config.head_size
        self.vte = nn.ModuleList(nn.Embedding(config.padded_vocab_size, width) for _ in range(config.value_embeddings))
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = make_norm(config)
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        if config.tie_head:
            self.lm_head.weight = self.wte.weight
        if config.unet and config.n_layer > 1:
            self.skip_mix = nn.Parameter(torch.ones(config.n_layer // 2))  # weight of each output handed over
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """GPT-2's: normal with deviation 0.02, biases zero, layer norms one. What adds to the residual stream
        is scaled down by the root of its 2 n_layer contributions (section 2.3 of the paper), or zero with
        zero_init, as is an untied head then. An embedding that is normed, and those of values, have deviation 1."""
        config = self.config
        for name, parameter in self.named_parameters():
            if name.endswith("_mix"):
                continue  # as they are made
            elif name.endswith("bias"):
                parameter.zero_()
            elif name.split(".")[-2].startswith("ln_"):
                parameter.fill_(1.0)
            elif config.zero_init and name.endswith(("c_proj.weight", "lm_head.weight")):
                parameter.zero_()
            elif name.startswith("vte") or (config.embedding_norm and name == "wte.weight" and not config.tie_head):
                parameter.normal_(0.0, 1.0)
            else:
                residual = name.endswith("c_proj.weight")
                parameter.normal_(0.0, 0.02 / math.sqrt(2 * config.n_layer) if residual else 0.02)

    def forward(
        self, idx: torch.Tensor, targets: torch.Tensor | None = None, cache: KVCache | None = None
    ) -> torch.Tensor:
        """Token ids (B, T) int64 to logits (B, T, V), or with targets (B, T) int64 to their summed loss, float32.

        Targets of -100 don't count. With a cache, idx are the tokens behind the ones it holds.
        """
        x = self.hidden(idx, cache)
        if targets is None:
            return self.logits(x)
        return linear_cross_entropy(
            x.flatten(0, 1), self.lm_head.weight, targets.flatten(), self.config.vocab_size, self.config.logit_softcap
        )

    def hidden(
        self, idx: torch.Tensor, cache: KVCache | None = None, positions: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Token ids (B, T) to what the head reads, (B, T, C).

        A row is a text from its beginning, or behind what the cache holds, unless `positions`, (B, T), and `mask`,
        (B, 1, T, T) bool, lay it out otherwise.
        """
        config = self.config
        T, start = idx.size(1), cache.length if cache is not None else 0
        if positions is None:
            if start + T > config.block_size:
                raise ValueError(f"{start + T} tokens are more than the block size of {config.block_size}")
            positions = torch.arange(start, start + T, device=idx.device)[None]  # (1, T)
            if cache is not None and cache.begins is not None:
                positions = (positions - cache.begins[:, None]).clamp(min=0)  # (B, T)
        x = self.wte(idx)  # (B, T, C)
        if not config.rope:
            x = x + self.wpe(positions)
        x = F.dropout(x, config.dropout, self.training)
        if config.embedding_norm:
            x = norm(x)
        values = [table(idx) for table in self.vte]
        if self.bf16_activations and torch.is_autocast_enabled(idx.device.type):
            dtype = torch.get_autocast_dtype(idx.device.type)
            x, values = x.to(dtype), [value.to(dtype) for value in values]
        turns = rotation(positions, config.head_size) if config.rope else None
        shared = Shared(cache, turns, self.mask(idx, positions, cache, mask), x, values)
        handed_over: list[torch.Tensor] = []
        half = config.n_layer // 2
        for i, block in enumerate(self.h):
            if config.unet and i >= config.n_layer - half:
                x = x + self.skip_mix[i - config.n_layer + half] * handed_over.pop()
            if self.recompute and self.training:
                x = compute_again(block, x, shared, use_reentrant=False)
            else:
                x = block(x, shared)
            if config.unet and i < half:
                handed_over.append(x)
        if cache is not None:
            cache.length += T
        return self.ln_f(x)

    def mask(
        self, idx: torch.Tensor, positions: torch.Tensor, cache: KVCache | None, given: torch.Tensor | None
    ) -> "torch.Tensor | BlockMask | None":
        """Which of the S keys each of the T queries sees, (B or 1, 1, T, S) bool; None: itself and all before.

        Compiled for CUDA it is FlexAttention's mask, which leaves out blocks that nobody sees.
        """
        config, T = self.config, idx.size(1)
        padded = cache is not None and cache.begins is not None
        window = min(config.window or config.block_size, config.block_size)
        if not (config.document_mask or window < config.block_size or padded):
            return given
        if config.document_mask and config.eot_id is not None:
            documents = (idx == config.eot_id).cumsum(dim=1)  # (B, T)
        else:
            documents = torch.zeros_like(idx[:1])  # (1, T): all is one document

        def sees(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            near = (q >= k) & (q - k < window)
            return near & (documents[b, q] == documents[b, k]) if config.document_mask else near

        plain = cache is not None or given is not None or not self.can_use_flex_attention
        if torch.compiler.is_compiling() and idx.device.type in FLEX_DEVICES and not plain:
            return create_block_mask(sees, documents.size(0) if config.document_mask else None, None, T, T, idx.device)

        key_positions, key_documents = positions, documents
        if cache is not None:
            start, end = cache.length, cache.length + T
            key_positions = torch.arange(end, device=idx.device)[None]  # slots
            positions = key_positions[:, start:]
            if start:
                documents = documents + cache.documents[:, start - 1 : start]
            if cache.begins is not None:
                documents = documents.masked_fill(positions < cache.begins[:, None], -1)
            cache.documents[:, start:end] = documents
            key_documents = cache.documents[:, :end]  # (B, S)
        distance = positions[:, :, None] - key_positions[:, None, :]  # (B or 1, T, S)
        seen = (distance >= 0) & (distance < window) & (documents[:, :, None] == key_documents[:, None, :])
        return seen[:, None] if given is None else seen[:, None] & given

    @property
    def can_use_flex_attention(self) -> bool:
        """Whether FlexAttention supports this model: it has no dropout, and no heads narrower than 16."""
        return self.config.head_size >= 16 and not (self.config.dropout > 0 and self.training)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """(..., C) to logits (..., V); the entries that only pad the vocabulary are -inf, so they get no
        probability wherever logits are sampled, scored or enter a loss."""
        logits = self.lm_head(x)
        if self.config.logit_softcap is not None:
            logits = softcapped(logits, self.config.logit_softcap)
        logits[..., self.config.vocab_size :] = float("-inf")
        return logits

    def num_params(self) -> int:
        """Parameters, the padding of the vocabulary left out: 124,439,808 for GPT-2's smallest."""
        config = self.config
        width = config.n_embd * (1 if config.tie_head else 2)  # of all tables
        width += config.value_embeddings * config.kv_heads * config.head_size
        padding = (config.padded_vocab_size - config.vocab_size) * width
        return sum(parameter.numel() for parameter in self.parameters()) - padding

    def flops_per_token(self) -> int:
        """Operations to train on one token, forward and backward.

        6 a weight of every matrix product (PaLM paper, appendix B: 2 forward, 4 backward), and 12 L T C for
        attention's two products over the context (or window), counted whole as is usual: 854.7 M for GPT-2 at T = 1024.
        """
        matrices = sum(module.weight.numel() for module in self.modules() if isinstance(module, nn.Linear))
        config = self.config
        context = min(config.window or config.block_size, config.block_size)
        return 6 * matrices + 12 * config.n_layer * context * config.n_embd

    def attention_backend(self, compiled: bool, bfloat16: bool) -> str:
        """The kernel of attention in training: PyTorch's flash, efficient or math, or flex for compiled masks."""
        config, device, T = self.config, self.wte.weight.device, self.config.block_size
        mask = self.mask(torch.zeros(1, T, dtype=torch.int64), torch.arange(T)[None], None, None)  # on the CPU
        if mask is not None and compiled and device.type in FLEX_DEVICES and self.can_use_flex_attention:
            return "flex"
        dtype = torch.bfloat16 if bfloat16 else torch.float32
        q = torch.empty(1, config.n_head, T, config.head_size, dtype=dtype, device=device)
        mask = None if mask is None else cast(torch.Tensor, mask).to(device)
        return attention_backend(q, config.kv_heads, mask, config.dropout)

    def make_cache(self, batch_size: int, dtype: torch.dtype, begins: torch.Tensor | None = None) -> KVCache:
        """An empty cache for texts of up to block_size tokens."""
        config = self.config
        shape = (batch_size, config.kv_heads, config.block_size, config.head_size)
        return KVCache(config.n_layer, shape, self.wte.weight.device, dtype, begins)

    def with_config(self, config: GPTConfig) -> "GPT":
        """A model of `config` with these weights. Dropout may differ, and block_size be smaller: the first positions
        are kept. ConfigError if anything else differs."""
        theirs, ours = asdict(self.config), asdict(config)
        free = {"dropout"}
        if ours["block_size"] < theirs["block_size"]:
            free.add("block_size")
        differing = [name for name in ours if theirs[name] != ours[name] and name not in free]
        if differing:
            raise ConfigError(
                f"the weights of {self.source} are of another architecture:\n"
                + "".join(f"  {name}: {theirs[name]} there, {ours[name]} here\n" for name in differing)
                + "Give the preset or the flags that fit them."
            )
        model, tensors = GPT(config), checkpoint.model_tensors(self)
        if "wpe.weight" in tensors:
            tensors["wpe.weight"] = tensors["wpe.weight"][: config.block_size]
        checkpoint.load_model_tensors(model, tensors)
        return model

    @classmethod
    def from_pretrained(cls, spec: str | Path, device: torch.device | str = "cpu") -> "GPT":
        """A model in eval mode, with its `tokenizer`, `source` and the run's `step`.

        `spec` is a run's directory (its latest checkpoint), a checkpoint's directory, a Hugging Face GPT-2 directory,
        or one of HUB_MODELS, which is downloaded once to data/. UserError if there is no intact model.
        """
        path = Path(spec)
        if (path / checkpoint.MANIFEST).exists():
            model = _from_checkpoint(path)
        elif found := checkpoint.checkpoints(path):
            latest = checkpoint.latest(path)
            if latest is None:
                raise UserError(f"none of the {len(found)} checkpoints of {path} is intact.")
            model = _from_checkpoint(latest)
        elif (path / "config.json").exists() and (path / checkpoint.MODEL).exists():
            model = _from_huggingface(path)
        elif str(spec) in HUB_MODELS:
            model = _from_hub(str(spec))
        else:
            raise UserError(
                f"there is no model at {spec}. Give a run's folder (out/NAME), a checkpoint's, a Hugging Face GPT-2 "
                f"folder, or one of {', '.join(HUB_MODELS)}."
            )
        return model.to(device).eval()


def config_of(state: dict) -> GPTConfig:
    """The architecture in a checkpoint's state; UserError if a later version of BabyGPT wrote it."""
    known = {field.name for field in fields(GPTConfig)}
    if unknown := sorted(set(state["model"]) - known):
        raise UserError(f"the checkpoint's model has settings that this version doesn't know: {', '.join(unknown)}.")
    return GPTConfig(**state["model"])


def _from_checkpoint(path: Path) -> GPT:
    """A model from one checkpoint; UserError if it is corrupted or its tensors are not those of its settings."""
    tensors, state = checkpoint.load_weights(path)
    try:
        config = config_of(state)
        if (layers := max(config.n_layer, config.value_embeddings)) > len(tensors):
            raise ValueError(f"{layers:,} layers of {len(tensors)} tensors")
        with torch.device("meta"):
            checkpoint.check_fit(GPT(config), tensors)  # before it takes memory
        model = GPT(config)
    except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise UserError(f"{path} holds no model of its settings: {error!r:.300}.") from None
    checkpoint.load_model_tensors(model, tensors)
    name = state["tokenizer"]["name"]
    model.tokenizer = load_tokenizer("gpt2" if name == "gpt2" else path.parent.parent / name)
    model.source, model.step = str(path), state["step"]
    return model


def _from_hub(name: str) -> GPT:
    folder = Path("data") / "huggingface" / name
    for file in ("config.json", checkpoint.MODEL):
        if not (folder / file).exists():
            hub.download(f"openai-community/{name}", file, None, folder, "model")
    model = _from_huggingface(folder)
    model.source = name
    return model


def _from_huggingface(folder: Path) -> GPT:
    """A model from a directory with Hugging Face's GPT-2 weights and their tokenizer."""
    config = GPTConfig(**huggingface.read_config(folder / "config.json"))
    tokenizer = _tokenizer_of(folder, config.vocab_size)
    config = replace(config, vocab_size=tokenizer.vocab_size)
    tensors = huggingface.read_weights(folder / checkpoint.MODEL)
    for name, tensor in tensors.items():
        if name.endswith(("wte.weight", "lm_head.weight")):
            tensors[name] = tensor[: config.vocab_size]  # no token has the rows from there on: they are padding
    model = from_gpt2(tensors, config)
    model.tokenizer, model.source, model.step = tokenizer, str(folder), None
    return model


def _tokenizer_of(folder: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer of a Hugging Face directory: its tokenizer.json; without one GPT-2's, if the vocabulary has its
    size. UserError if the tokenizer is unknown, or has ids that the model has not."""
    if (folder / "tokenizer.json").exists():
        tokenizer = load_tokenizer(folder)
        if tokenizer.vocab_size > vocab_size:
            raise UserError(
                f"{folder / 'tokenizer.json'} has {tokenizer.vocab_size:,} entries, but the model of {folder} has only "
                f"{vocab_size:,}. Give it the tokenizer that it was trained with."
            )
        return load_tokenizer("gpt2") if is_gpt2(tokenizer) else tokenizer  # the same tokenizer has one sha256
    if vocab_size != load_tokenizer("gpt2").vocab_size:
        raise UserError(
            f"{folder} has no tokenizer.json, and its vocabulary of {vocab_size:,} is not GPT-2's. Add the "
            "tokenizer.json that the model was trained with."
        )
    return load_tokenizer("gpt2")


def from_gpt2(state: dict[str, torch.Tensor], config: GPTConfig) -> GPT:
    """A model from Hugging Face's GPT-2 tensors. A smaller block size keeps the first positions."""
    model = GPT(config)
    huggingface.load_tensors(model.state_dict(), state, config.vocab_size, config.tie_head)
    return model


def to_gpt2(model: GPT) -> dict[str, torch.Tensor]:
    """The model's tensors under Hugging Face's GPT-2 names and shapes, padding cut off."""
    config = model.config
    shape = {name: getattr(config, name) for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")}
    plain = GPTConfig(**shape, n_kv_head=config.n_kv_head, dropout=config.dropout, tie_head=config.tie_head)
    if config.kv_heads != config.n_head or replace(config, eot_id=None) != plain:
        raise UserError(
            "this model is no GPT-2 (grouped heads, no biases, or what came later): it can't be told as one."
        )
    return huggingface.export_tensors(model.state_dict(), config.vocab_size)
