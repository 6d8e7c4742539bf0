"""All settings of a run: the one file to edit. Each field is also a flag; `python train.py --help` lists them.

    python train.py                                    # the preset gpt2
    python train.py demo --training.max-steps 100      # another preset, with one field changed

Each section is a dataclass. PRESETS lists the fields in which a preset differs from the defaults. An `every_n_steps` of
0 means never.
"""

import json
import math
import os
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from annotated_types import Ge, Gt, Le, Lt, MinLen

from babygpt.constraints import (
    Fraction,
    NonNegative,
    Positive,
    Probability,
    Seed,
    flag,
    metavar,
    parse_command_line,
    summary,
    violations,
)
from babygpt.data.shards import Dataset
from babygpt.errors import ConfigError, UserError, suggest
from dataloader import default_chunk_tokens, default_num_streams
from model import GPTConfig, ModernConfig, config_from_dict

OUT_PRESET = Path("out/PRESET")  # PRESET stands for the name of the preset

Mode = Literal["train", "val", "eval", "sample"]
Rate = Annotated[float, Ge(0)]
DecayRate = Annotated[float, Ge(0), Lt(1)]
Steps = Annotated[NonNegative, metavar("N")]


@dataclass(frozen=True)
class General:
    """Tasks, initial weights, and device."""

    # tasks: train, val (validation loss), eval (HellaSwag) and sample (generate text). Without train, the other tasks
    # run once, on the model that init_from names or, if it is scratch or resume, on the latest checkpoint in out_dir
    mode: Annotated[tuple[Mode, ...], MinLen(1), metavar("MODE [MODE ...]")] = ("train", "val", "eval", "sample")
    # initial weights: scratch (random), resume (the latest checkpoint in out_dir; scratch if there is none), gpt2,
    # gpt2-medium, gpt2-large or gpt2-xl (from the Hugging Face Hub), or the path to a model
    init_from: Annotated[str, metavar("WEIGHTS")] = "scratch"
    out_dir: Path = OUT_PRESET  # run directory
    seed: Seed = 1337  # seed for the initial weights, the data order, and dropout
    device: Literal["auto", "cuda", "cpu", "mps"] = "auto"  # device to run on; auto: CUDA if available, otherwise CPU
    deterministic: bool = False  # use only deterministic CUDA kernels, which are slower
    # minutes that a rank waits for the other ranks before it aborts
    timeout_minutes: Annotated[float, Gt(0), Le(100_000), metavar("MINUTES")] = 30.0


@dataclass(frozen=True)
class Data:
    """Dataset and data order."""

    dataset: Annotated[str, metavar("PATH")] = "data/fineweb-edu-10BT"  # dataset directory, prepared by fineweb.py
    # approximate length of the chunks that are shuffled, in tokens
    chunk_tokens: Annotated[Positive | None, metavar("TOKENS", "1/16 of a stream, at most 1M")] = None
    # number of equal parts of the shuffled data that are read in parallel
    num_streams: Annotated[Positive | None, metavar("N", "1024, or fewer for a small dataset")] = None


@dataclass(frozen=True)
class Training:
    """Training loop."""

    # number of optimizer steps; 19,073 steps of 524,288 tokens are 10B tokens
    max_steps: Annotated[Positive, metavar("N")] = 19_073
    batch_tokens: Annotated[Positive, metavar("TOKENS")] = 524_288  # tokens per optimizer step, over all ranks
    # rows per forward pass on each rank; 0: automatic, up to 64 on a GPU with enough memory, up to 16 on a CPU
    micro_batch_size: Annotated[NonNegative, metavar("ROWS")] = 0
    # data type for matrix multiplications; auto: bfloat16 if the device supports it, otherwise float32
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    bf16_activations: bool = False  # with bfloat16, keep the residual stream in bfloat16 too: less memory traffic
    compile: Literal["auto", "on", "off"] = "auto"  # use torch.compile; auto: on CUDA, and on a CPU for long runs
    activation_checkpointing: bool = False  # recompute activations in the backward pass: less memory, but slower
    bf16_gradients: bool = False  # all-reduce gradients in bfloat16: half the traffic
    compare_ranks_every_n_steps: Steps = 100  # check every N steps that all ranks have identical weights; 0: never
    # skip the update if the loss is more than this number of standard deviations above the mean of recent losses
    skip_spikes: Annotated[float | None, Ge(1), metavar("DEVIATIONS", "off")] = None


@dataclass(frozen=True)
class Optimizer:
    """Optimizer and learning-rate schedule."""

    name: Literal["adamw", "muon"] = "adamw"  # muon: Muon for the matrices of the blocks, and Adam for the rest
    # peak learning rate (GPT-3 used 6e-4 for 125M parameters); with muon: peak learning rate of the matrices only
    max_lr: Rate = 6e-4
    min_lr_ratio: Fraction = 0.1  # learning rate at the last step, as a fraction of the peak
    warmup_steps: Steps = 715  # number of steps of linear warmup; GPT-3 used 375M tokens: 715 steps
    # final fraction of the steps, over which the learning rate decays linearly to its minimum; None: cosine decay
    cooldown: Annotated[Fraction | None, metavar("FRACTION", "cosine decay")] = None
    weight_decay: Rate = 0.1  # weight decay of matrices and embeddings; with muon: of the matrices only
    # Adam's decay rate of the moving average of gradients
    beta1: Annotated[DecayRate | None, metavar("RATE", "0.9; with muon 0.6 to 0.8, depending on the batch size")] = None
    beta2: DecayRate = 0.95  # Adam's decay rate of the moving average of squared gradients
    eps: Annotated[float, Gt(0)] = 1e-8  # term added to Adam's denominator for numerical stability
    grad_clip: Rate = 1.0  # maximum norm of the gradient; 0: no clipping
    embedding_lr: Rate = 0.6  # with muon: peak learning rate of embeddings
    head_lr: Rate = 0.008  # with muon: peak learning rate of lm_head, even if it is tied to wte
    scalar_lr: Rate = 0.04  # with muon: peak learning rate of vectors and scalars
    # with muon: momentum of the matrices
    momentum: Annotated[DecayRate | None, metavar("RATE", "with muon 0.8 to 0.95, depending on the batch size")] = None
    momentum_warmup_steps: Steps = 300  # with muon: number of steps over which a momentum above 0.85 rises from 0.85
    normuon: bool = False  # with muon: divide the update of each neuron by its recent RMS (arXiv:2510.05491)
    cautious: bool = False  # with muon: apply weight decay to a weight only if the update also shrinks it


@dataclass(frozen=True)
class Validation:
    """Loss on the validation split, always on the same tokens."""

    # validate before the first step, every N steps, and after the last step; 0: never
    every_n_steps: Steps = 250


@dataclass(frozen=True)
class Evaluation:
    """Accuracy on HellaSwag."""

    every_n_steps: Steps = 250  # evaluate every N steps and after the last step; 0: never
    style: Literal["karpathy", "lm-eval"] = "karpathy"  # scoring method; log.csv records acc_norm only with karpathy
    # examples in HellaSwag's jsonl format
    file: Annotated[str | None, metavar("PATH|URL", "HellaSwag's validation set, downloaded once")] = None
    # language of the examples: en, or de, fr, pl, ... for a translation (openGPT-X/hellaswagx on the Hugging Face Hub)
    language: Annotated[str, metavar("CODE")] = "en"
    limit: Annotated[Positive | None, metavar("N", "all examples")] = None  # evaluate only the first N examples


@dataclass(frozen=True)
class Sampling:
    """Text generated during training, written to samples.txt."""

    every_n_steps: Steps = 250  # generate samples every N steps and after the last step; 0: never
    prompt: Annotated[str, metavar("TEXT")] = "Hello, I'm a language model,"  # text that every sample starts with
    num_samples: Positive = 4  # number of samples
    max_new_tokens: Annotated[Positive, metavar("TOKENS")] = 64  # maximum number of new tokens per sample
    temperature: Rate = 1.0  # softmax temperature; 0: greedy decoding
    # sample from the N most probable tokens; None: all tokens
    top_k: Annotated[Positive | None, metavar("N", "all tokens")] = 50
    # sample from the smallest set of most probable tokens whose total probability reaches this value
    top_p: Annotated[Probability | None, metavar("PROBABILITY", "off")] = None


@dataclass(frozen=True)
class Saving:
    """Checkpoints."""

    # save a checkpoint every N steps and after the last step; 0: only when Ctrl-C or another signal stops the run
    every_n_steps: Steps = 1000
    keep: NonNegative = 2  # number of most recent checkpoints to keep; 0: all
    keep_every: Steps = 0  # also keep checkpoints whose step is a multiple of this number; 0: none


@dataclass(frozen=True)
class Logging:
    """Console output. log.csv records every step."""

    every_n_steps: Steps = 1  # print a line every N steps; 0: never


@dataclass(frozen=True)
class Config:
    general: General = field(default_factory=General)
    data: Data = field(default_factory=Data)
    model: GPTConfig = field(default_factory=lambda: GPTConfig(vocab_size=0))
    training: Training = field(default_factory=Training)
    optimizer: Optimizer = field(default_factory=Optimizer)
    validation: Validation = field(default_factory=Validation)
    evaluation: Evaluation = field(default_factory=Evaluation)
    sampling: Sampling = field(default_factory=Sampling)
    saving: Saving = field(default_factory=Saving)
    logging: Logging = field(default_factory=Logging)


# ---------------------------------------------------------------------------------------------------------
# presets


MODERN_MODEL: dict[str, Any] = {
    "bias": False, "tie_head": False, "rope": True, "qk_norm": True, "attention_score_factor": 1.44,
    "partial_key_offset": True, "relu2": True, "embedding_norm": True, "value_embeddings": 2, "bigram_tables": 5,
    "x0_shortcut": True,
}  # fmt: skip
MODERN_OPTIMIZER: dict[str, Any] = {
    "name": "muon", "normuon": True, "max_lr": 0.04, "min_lr_ratio": 0.0, "warmup_steps": 0, "cooldown": 0.3,
    "eps": 1e-10, "weight_decay": 0.0, "grad_clip": 0.0,
}  # fmt: skip
DEMO_MODEL: dict[str, Any] = {"block_size": 256, "n_layer": 4, "n_head": 4, "n_embd": 192}
DEMO: dict[str, dict[str, Any]] = {
    "data": {"dataset": "data/demo"},
    "training": {"max_steps": 400, "batch_tokens": 4096, "micro_batch_size": 16, "compile": "off"},
    "validation": {"every_n_steps": 40},
    "evaluation": {"every_n_steps": 400, "limit": 200},
    "sampling": {"every_n_steps": 200, "prompt": "def ", "num_samples": 2, "temperature": 0.8},
    "saving": {"every_n_steps": 200},
    "logging": {"every_n_steps": 10},
}

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    # the four sizes of GPT-2, with the GPT-3 paper's learning rates for these sizes (table 2.1)
    "gpt2": {},
    "gpt2-medium": {"model": {"n_layer": 24, "n_head": 16, "n_embd": 1024}, "optimizer": {"max_lr": 3e-4}},
    "gpt2-large": {"model": {"n_layer": 36, "n_head": 20, "n_embd": 1280}, "optimizer": {"max_lr": 2.5e-4}},
    "gpt2-xl": {"model": {"n_layer": 48, "n_head": 25, "n_embd": 1600}, "optimizer": {"max_lr": 2e-4}},
    # the smallest size with the improvements of the public speed records (docs/modern.md)
    "modern": {"model": MODERN_MODEL, "training": {"max_steps": 3000}, "optimizer": MODERN_OPTIMIZER},
    # three minutes on two CPU cores, on the source code of Python's standard library: the recipe of modern, or of gpt2
    "demo": DEMO | {"model": MODERN_MODEL | DEMO_MODEL, "optimizer": MODERN_OPTIMIZER},
    "demo-classic": DEMO | {"model": DEMO_MODEL, "optimizer": {"max_lr": 3e-3, "warmup_steps": 40}},
    # recipes of other projects; docs/recipes.md has the results that their authors report
    "babygpt-en": {"data": {"dataset": "data/fineweb-10BT", "chunk_tokens": 30_000_000, "num_streams": 64}},
    "babygpt-pl": {
        "data": {"dataset": "data/fineweb2-pl", "chunk_tokens": 30_000_000, "num_streams": 64},
        "model": {"n_kv_head": 6},
        "training": {"max_steps": 10_000, "micro_batch_size": 32},
        "optimizer": {"warmup_steps": 1000},
        "validation": {"every_n_steps": 300},
        "evaluation": {"every_n_steps": 300, "language": "pl"},
        "sampling": {"prompt": "Jestem modelem językowym,"},
        "saving": {"every_n_steps": 5000},
    },
    "edu-270m": {
        "model": {"n_layer": 16, "n_head": 16, "n_embd": 1056},
        "sampling": {"prompt": "Once upon a time"},
        "saving": {"every_n_steps": 5000},
    },
    "gpt-xs": {
        "model": {"block_size": 512},
        "training": {"micro_batch_size": 64},
        "validation": {"every_n_steps": 500},
        "sampling": {"every_n_steps": 1000},
        "saving": {"every_n_steps": 5000},
    },
    "smollgpt": {
        "data": {"dataset": "data/wikipedia-en"},
        "model": {"n_layer": 8, "n_head": 8, "tie_head": False, "dropout": 0.1},
        "training": {"max_steps": 33_500, "batch_tokens": 262_144, "micro_batch_size": 32},
        "optimizer": {"max_lr": 1.2e-3, "warmup_steps": 6_700},
        "saving": {"every_n_steps": 500},
    },
}


# ---------------------------------------------------------------------------------------------------------
# from a preset and flags to a checked configuration


MODERN_FIELDS = {f.name for f in fields(ModernConfig)} - {f.name for f in fields(GPTConfig)}


def variant(config: Config, **sections: dict[str, Any]) -> Config:
    """Return the config with some fields changed: variant(config, training={"max_steps": 10})."""
    return replace(config, **{name: replace(getattr(config, name), **values) for name, values in sections.items()})


def preset(name: str) -> Config:
    """Return the config of a preset. Its model is a ModernConfig if it sets a field that only ModernConfig has."""
    sections = PRESETS[name]
    config = Config()
    model = sections.get("model")
    if isinstance(model, dict) and MODERN_FIELDS & model.keys():
        config = replace(config, model=ModernConfig(**asdict(config.model)))
    problems = []
    for section, values in sections.items():
        if not hasattr(config, section):
            problems.append(f"There is no section {section!r}. {suggest(section, [f.name for f in fields(Config)])}")
        elif not isinstance(values, dict):
            problems.append(f"{section} is {values!r:.50}, not a dictionary. Remove any comma after its closing brace.")
        else:
            known = [f.name for f in fields(ModernConfig if section == "model" else getattr(config, section))]
            unknown = [name for name in values if name not in known]
            problems += [f"{section} has no field {name!r}. {suggest(name, known)}" for name in unknown]
    if not problems:
        config = variant(config, **sections)
        problems = violations(config)
    if problems:
        raise ConfigError("\n  ".join([f"The preset {name!r} in train_config.py is invalid:", *problems]))
    return variant(config, general={"out_dir": Path(str(config.general.out_dir).replace("PRESET", name))})


def parse(arguments: list[str]) -> tuple[str, Config]:
    """Return the name of the preset and the config of `[PRESET] [--SECTION.FIELD VALUE ...]`."""
    name, rest = "gpt2", arguments
    if arguments and not arguments[0].startswith("-"):
        name, rest = arguments[0], arguments[1:]
    if name not in PRESETS:
        raise ConfigError(f"There is no preset {name!r}. {suggest(name, PRESETS)}")
    defaults = preset(name)
    modern_flags = {flag(f"model.{prefix}{field}") for field in MODERN_FIELDS for prefix in ("", "no-")}
    if not isinstance(defaults.model, ModernConfig) and (
        used := modern_flags & {word.split("=")[0].replace("_", "-") for word in rest}
    ):
        raise ConfigError(
            f"{', '.join(sorted(used))}: the preset {name} is a classic GPT-2 and does not have these settings. Use "
            "the preset modern: python train.py modern ..."
        )
    preset_argument = tyro.conf.arg(metavar="[PRESET]", help=", ".join(PRESETS), help_behavior_hint="(default: gpt2)")

    def command(
        preset: Annotated[tyro.conf.Positional[str | None], preset_argument] = None,
        config: Annotated[Config, tyro.conf.arg(name="")] = defaults,
    ) -> tuple[str | None, Config]:
        return preset, config

    misplaced, config = parse_command_line(
        command,
        "train.py",
        f"Train, validate and evaluate a GPT, and sample from it. The defaults are those of the preset {name}.",
        args=rest,
        console_outputs=os.environ.get("LOCAL_RANK", "0") == "0",  # one rank per node prints errors
    )
    if misplaced is not None:
        raise ConfigError(f"Unrecognized argument {misplaced!r}. A preset comes first: train.py PRESET [OPTIONS].")
    return name, config


def resolve(config: Config, world_size: int) -> Config:
    """Check the config for this number of ranks, and resolve beta1 and momentum. Reads no files.

    Raises a ConfigError with all problems.
    """
    problems = violations(config)
    if not any(problem.startswith(("--model.", "--training.")) for problem in problems):
        problems += conflicts(config, world_size)
    if problems:
        raise ConfigError(summary(problems, "The settings are invalid:"))
    return with_momentum_defaults(config)


def with_momentum_defaults(config: Config) -> Config:
    """Set beta1 and, with muon, momentum if they are None.

    Between 32,768 and 524,288 tokens per step, they grow linearly with the logarithm of the batch size. The values for
    large batches are modded-nanogpt's. Those for small ones were best in runs of 100 to 800 steps of a small model.
    """
    fraction = min(1.0, max(0.0, math.log2(config.training.batch_tokens / 32_768) / 4))
    defaults = {"beta1": 0.9}
    if config.optimizer.name == "muon":
        defaults = {"beta1": 0.6 + 0.2 * fraction, "momentum": 0.8 + 0.15 * fraction}
    return variant(config, optimizer={k: v for k, v in defaults.items() if getattr(config.optimizer, k) is None})


def conflicts(config: Config, world_size: int) -> list[str]:
    """Return one sentence for each combination of valid values that does not work."""
    model, training, problems = config.model, config.training, []
    if model.n_embd % model.n_head:
        problems.append(
            f"--model.n-embd {model.n_embd} is not divisible by --model.n-head {model.n_head}. Use a multiple of "
            f"{model.n_head}."
        )
    if model.n_head % model.kv_heads:
        divisors = ", ".join(str(n) for n in range(1, model.n_head + 1) if model.n_head % n == 0)
        problems.append(
            f"--model.n-kv-head {model.n_kv_head} does not divide --model.n-head {model.n_head}. Use one of {divisors}."
        )
    if isinstance(model, ModernConfig):
        if (model.rope or model.partial_key_offset) and model.head_size % 4:
            problems.append(
                f"--model.n-embd {model.n_embd} / --model.n-head {model.n_head} is a head size of {model.head_size}. "
                "--model.rope and --model.partial-key-offset require a multiple of 4. Use a --model.n-embd divisible "
                f"by {4 * model.n_head}."
            )
        if 2 * model.value_embeddings > model.n_layer:
            problems.append(
                f"--model.value-embeddings {model.value_embeddings} is more than half of --model.n-layer "
                f"{model.n_layer}. Use at most {model.n_layer // 2}."
            )
    micro = training.micro_batch_size
    multiple = (micro or 1) * model.block_size * world_size
    if "train" in config.general.mode and training.batch_tokens % multiple:
        names, numbers, others = ["block_size", "ranks"], [f"{model.block_size:,}", f"{world_size}"], ""
        if micro:
            names, numbers = ["micro_batch_size", *names], [f"{micro}", *numbers]
            others = ", or a different micro_batch_size"
        problems.append(
            f"--training.batch-tokens {training.batch_tokens:,} is not divisible by {' x '.join(names)} = "
            f"{' x '.join(numbers)} = {multiple:,}. Use a multiple of {multiple:,}, such as "
            f"{max(1, training.batch_tokens // multiple) * multiple:,}{others}."
        )
    return problems


def bind(config: Config, dataset: Dataset) -> Config:
    """Fill in vocab_size, eot_id and chunk_tokens from the dataset. ConfigError lists all conflicts with it."""
    model, data, problems = config.model, config.data, []
    if model.vocab_size not in (0, dataset.vocab_size):
        problems.append(
            f"--model.vocab-size {model.vocab_size:,} does not match {data.dataset}, whose vocabulary size is "
            f"{dataset.vocab_size:,}. Omit it: the model takes it from the dataset."
        )
    config = variant(config, model={"vocab_size": dataset.vocab_size})
    if isinstance(model, ModernConfig):
        if model.eot_id not in (None, dataset.eot_id):
            problems.append(f"--model.eot-id {model.eot_id} is not the dataset's EOT id, {dataset.eot_id}. Omit it.")
        config = variant(config, model={"eot_id": dataset.eot_id if model.document_mask else None})
    has_validation = {"train", "val"} <= {*config.general.mode} and config.validation.every_n_steps > 0
    if has_validation and len(dataset.val) <= model.block_size:
        problems.append(
            f"{data.dataset} has {len(dataset.val):,} validation tokens, but one row takes --model.block-size + 1 = "
            f"{model.block_size + 1:,} tokens. Prepare it with a larger --val-tokens and more than one document, or "
            "remove val from --general.mode."
        )
    if problems:
        raise ConfigError(summary(problems, f"The settings do not fit {data.dataset}:"))
    num_streams = data.num_streams or default_num_streams(len(dataset.train), model.block_size)
    chunk_tokens = data.chunk_tokens or default_chunk_tokens(len(dataset.train), num_streams, model.block_size)
    return variant(config, data={"num_streams": num_streams, "chunk_tokens": chunk_tokens})


# ---------------------------------------------------------------------------------------------------------
# memory


# conservative estimates of device memory in bfloat16; results/speed/fake-h200.md has 32 GB for 64 rows of GPT-2
ACTIVATION_BYTES = 46  # per token, layer and channel; 60 for the modern GPT
BYTES_PER_PARAMETER = 20  # weight 4, gradient 4, two moments of Adam 8, bfloat16 copy 2, rounded up
LOGITS_BYTES = 2 << 30


def with_micro_batch_size(config: Config, device_memory: int, world_size: int) -> Config:
    """Resolve a micro_batch_size of 0.

    It becomes the largest power of two, at most 64, whose estimated memory is under 0.8 of `device_memory` bytes, or 16
    on a CPU, where `device_memory` is 0. For training, it is the largest divisor of the rows per rank up to this.
    """
    model, training = config.model, config.training
    if training.micro_batch_size:
        return config
    max_rows = 16
    if device_memory:
        modern = isinstance(model, ModernConfig)
        tables = (1.0 if model.tie_head else 2.0) + getattr(model, "bigram_tables", 0)
        tables += getattr(model, "value_embeddings", 0) * model.kv_heads / model.n_head
        parameters = 12 * model.n_layer * model.n_embd**2 + tables * model.padded_vocab_size * model.n_embd
        row_bytes = ACTIVATION_BYTES * (1.3 if modern else 1.0) * model.n_layer * model.n_embd * model.block_size
        available = 0.8 * device_memory - BYTES_PER_PARAMETER * parameters - LOGITS_BYTES
        max_rows = next((n for n in (64, 32, 16, 8, 4, 2) if n * row_bytes < available), 1)
    trains = "train" in config.general.mode
    rows = max(1, training.batch_tokens // model.block_size // world_size) if trains else max_rows
    return variant(config, training={"micro_batch_size": max(n for n in range(1, max_rows + 1) if rows % n == 0)})


def micro_batch_warning(config: Config, world_size: int) -> str | None:
    """Return a warning if micro_batch_size is small because the number of rows has few divisors, otherwise None."""
    rows = config.training.batch_tokens // config.model.block_size // world_size
    micro = config.training.micro_batch_size
    if micro >= 8 or micro == rows or any(rows % n == 0 for n in range(micro + 1, 4 * micro + 1)):
        return None
    return (
        f"Micro-batches of {micro} rows are slow. Each rank has {rows:,} rows per step, with no larger divisor up "
        f"to {4 * micro}. Use a --training.batch-tokens with a multiple of 16 rows per rank, such as "
        f"{math.ceil(rows / 16) * 16 * world_size * config.model.block_size:,}."
    )


def memory_advice(config: Config, world_size: int) -> str:
    """Return what to change if memory runs out, the smallest change first."""
    training, options = config.training, []
    rows = training.batch_tokens // config.model.block_size // world_size
    smaller = [m for m in range(1, training.micro_batch_size) if rows % m == 0]
    if smaller:
        options.append(f"--training.micro-batch-size {smaller[-1]}: the same batch in more forward passes")
    if not training.activation_checkpointing:
        options.append("--training.activation-checkpointing: slower by about a third")
    options.append("a smaller --model.block-size, or a smaller model")
    return "\n  - ".join(["Use one of these, the smallest change first:", *options])


# ---------------------------------------------------------------------------------------------------------
# config.json


def to_json(config: Config) -> dict[str, dict[str, Any]]:
    return json.loads(json.dumps(asdict(config), default=str))  # str: for Path


def from_json(values: dict[str, Any]) -> Config:
    """Return the config from the output of `to_json`. UserError if its fields are not those of this version."""
    try:
        sections = {field.name: dict(values[field.name]) for field in fields(Config)}
        general = sections["general"]
        general |= {"mode": tuple(general["mode"]), "out_dir": Path(general["out_dir"])}
        model = config_from_dict(sections.pop("model"))
        return variant(replace(Config(), model=model), **sections)
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(f"A different version of BabyGPT wrote the settings ({error}). Use that version.") from None
