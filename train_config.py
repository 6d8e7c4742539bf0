"""All settings of a run: the one file to edit. Each field is a flag too, and `--help` shows every one.

    python train.py                                    # the preset gpt2
    python train.py demo --training.max-steps 100      # another preset, and one field changed

A section is a dataclass; PRESETS at the end are data. 0 for an `every_n_steps` means never.
"""

import dataclasses
import difflib
import json
import math
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from babygpt.data.shards import Dataset, open_dataset
from babygpt.errors import ConfigError, UserError
from model import GPTConfig

# estimates of device memory in bfloat16, on the safe side of results/speed/fake-h200.md: 32 GB for 64 rows of GPT-2
ACTIVATION_BYTES = 46  # per token, layer and channel
PARAMETER_BYTES = 20  # per parameter: weight, gradient, two moments of Adam, a bfloat16 copy
LOGITS_BYTES = 2 << 30
OUT_PRESET = Path("out/gpt2")  # stands for out/PRESET, whatever the preset is
Mode = Literal["train", "val", "eval", "sample"]


@dataclass(frozen=True)
class General:
    """What to do, where, from what."""

    mode: tuple[Mode, ...] = ("train", "val", "eval", "sample")  # any subset; without train, a checkpoint is read
    init_from: str = "scratch"  # scratch, resume (scratch where there is no checkpoint), gpt2[-medium ...], or a path
    out_dir: Path = OUT_PRESET  # directory of the run [out/PRESET]
    seed: int = 1337  # of the initial weights, the order of the data, and dropout
    device: Literal["auto", "cuda", "cpu", "mps"] = "auto"  # auto: cuda where there is one, else cpu
    deterministic: bool = False  # on CUDA, the same bytes from run to run; slower
    timeout_minutes: float = 30.0  # how long ranks wait for one that is silent, or for rank 0's downloads


@dataclass(frozen=True)
class Data:
    """The data set and its order."""

    dataset: str = "data/fineweb-edu-10BT"  # a folder that fineweb.py prepared
    chunk_tokens: int | None = None  # shuffled as one piece, about [from the data's size, 1 M at most]
    num_streams: int = 64  # equal pieces of the shuffled data that a step reads side by side


@dataclass(frozen=True)
class Training:
    """The training loop."""

    max_steps: int = 19_073  # optimizer steps; 19,073 of 524,288 tokens are 10 B
    batch_tokens: int = 524_288  # tokens an optimizer step, over all ranks
    micro_batch_size: int = 0  # rows per rank and forward pass; 0: 64 or as many as fit in the GPU, 16 on a CPU
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of matrix products; auto: bfloat16 where the device has it
    bf16_activations: bool = False  # with bfloat16, also the activations between products: less memory traffic
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile; auto: on CUDA
    activation_checkpointing: bool = False  # blocks are computed again in the backward pass: slower, in less memory
    bf16_gradients: bool = False  # ranks exchange gradients in bfloat16: half the traffic
    compare_ranks_every_n_steps: int = 100  # whether all have the same weights, to the bit
    skip_spikes: float | None = None  # leave out updates whose loss is so many standard deviations too high [none]


@dataclass(frozen=True)
class Optimizer:
    """AdamW, or Muon for the blocks' matrices with Adam for the rest; and the learning rate."""

    name: Literal["adamw", "muon"] = "adamw"
    max_lr: float = 6e-4  # after the warm-up (GPT-3 paper, table 2.1, for 125 M parameters); with muon Muon's own
    min_lr_ratio: float = 0.1  # of each highest rate, at the last step
    warmup_steps: int = 715  # 375 M tokens, as in the GPT-3 paper
    cooldown: float | None = None  # share of the steps, at the end, in which a constant rate falls linearly [cosine]
    weight_decay: float = 0.1  # on matrices and embeddings, not on biases and layer norms; with muon on its matrices
    beta1: float = 0.9  # decay of the mean of gradients
    beta2: float = 0.95  # decay of the mean of their squares
    eps: float = 1e-8  # added to the root of the latter
    grad_clip: float = 1.0  # largest norm of the whole gradient; 0: no clipping
    # with muon
    embedding_lr: float = 0.6  # Adam's rates, as in modded-nanogpt's records
    head_lr: float = 0.008  # of an untied head
    scalar_lr: float = 0.04  # of what has one dimension or none
    momentum_warmup_steps: int = 300  # Muon's momentum rises from 0.85 to 0.95 meanwhile
    cautious: bool = False  # decay a weight only where the update makes it smaller too


@dataclass(frozen=True)
class Validation:
    """Loss on the validation split: always the same tokens."""

    every_n_steps: int = 250  # also before the first step and after the last


@dataclass(frozen=True)
class Evaluation:
    """HellaSwag."""

    every_n_steps: int = 250  # also after the last step
    style: Literal["karpathy", "lm-eval"] = "karpathy"  # the log's column takes karpathy's acc_norm alone
    file: str | None = None  # path or URL of a file in HellaSwag's jsonl format [fetched]
    language: str = "en"  # of a translation on the hub (openGPT-X/hellaswagx): de, fr, pl, ...
    limit: int | None = None  # only the first so many examples [all 10,042]


@dataclass(frozen=True)
class Sampling:
    """Texts that the model writes along the way, into samples.txt."""

    every_n_steps: int = 250  # also after the last step
    prompt: str = "Hello, I'm a language model,"
    num_samples: int = 4
    max_new_tokens: int = 64
    temperature: float = 1.0  # 0: always the likeliest token
    top_k: int | None = 50  # only the k likeliest tokens
    top_p: float | None = None  # only the likeliest tokens that hold this share of the probability


@dataclass(frozen=True)
class Saving:
    """Checkpoints."""

    every_n_steps: int = 1000  # also after the last step, and when the run is told to stop
    keep: int = 2  # the newest so many; 0: all
    keep_every: int = 0  # those of every so many steps are kept for good; 0: none


@dataclass(frozen=True)
class Logging:
    """The console; log.csv has every step anyhow."""

    every_n_steps: int = 1  # a line


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


def variant(base: Config, **sections: dict[str, Any]) -> Config:
    """A config with some fields changed: variant(base, training={"max_steps": 10})."""
    return replace(base, **{name: replace(getattr(base, name), **fields) for name, fields in sections.items()})


GPT2 = Config()

PRESETS: dict[str, Config] = {
    # GPT-2's four sizes; learning rates are the GPT-3 paper's (table 2.1) for models of those sizes
    "gpt2": GPT2,
    # the same model by what public speed records found: see "The modern recipe" in the README
    "modern": variant(
        GPT2,
        model={
            "bias": False,
            "tie_head": False,
            "rope": True,
            "qk_norm": True,
            "relu2": True,
            "rms_norm": True,
            "embedding_norm": True,
            "zero_init": True,
            "value_embeddings": 2,
            "x0_shortcut": True,
            "unet": True,
            "logit_softcap": 15.0,
        },
        training={"max_steps": 3000},
        optimizer={
            "name": "muon",
            "max_lr": 0.04,
            "min_lr_ratio": 0.0,
            "warmup_steps": 0,
            "cooldown": 0.3,
            "beta1": 0.8,
            "eps": 1e-10,
            "weight_decay": 0.0,
            "grad_clip": 0.0,
        },
    ),
    "gpt2-medium": variant(
        GPT2,
        model={"n_layer": 24, "n_head": 16, "n_embd": 1024},
        optimizer={"max_lr": 3e-4},
    ),
    "gpt2-large": variant(
        GPT2,
        model={"n_layer": 36, "n_head": 20, "n_embd": 1280},
        optimizer={"max_lr": 2.5e-4},
    ),
    "gpt2-xl": variant(
        GPT2,
        model={"n_layer": 48, "n_head": 25, "n_embd": 1600},
        optimizer={"max_lr": 2e-4},
    ),
    # three minutes on a laptop: Python from Python's own standard library
    "demo": variant(
        GPT2,
        data={"dataset": "data/demo"},
        model={"block_size": 256, "n_layer": 4, "n_head": 4, "n_embd": 192},
        training={"max_steps": 400, "batch_tokens": 4096, "micro_batch_size": 16, "compile": "off"},
        optimizer={"max_lr": 3e-3, "warmup_steps": 40},
        validation={"every_n_steps": 40},
        evaluation={"every_n_steps": 400, "limit": 200},
        sampling={"every_n_steps": 200, "prompt": "def ", "num_samples": 2, "temperature": 0.8},
        saving={"every_n_steps": 200},
        logging={"every_n_steps": 10},
    ),
    # the recipes of known systems; the README tells what their authors reported
    "babygpt-en": variant(
        GPT2,
        data={"dataset": "data/fineweb-10BT", "chunk_tokens": 30_000_000},
    ),
    "babygpt-pl": variant(
        GPT2,
        data={"dataset": "data/fineweb2-pl", "chunk_tokens": 30_000_000},
        model={"n_kv_head": 6},
        training={"max_steps": 10_000, "micro_batch_size": 32},
        optimizer={"warmup_steps": 1000},
        validation={"every_n_steps": 300},
        evaluation={"every_n_steps": 300, "language": "pl"},
        sampling={"prompt": "Jestem modelem językowym,"},
        saving={"every_n_steps": 5000},
    ),
    "edu-270m": variant(
        GPT2,
        model={"n_layer": 16, "n_head": 16, "n_embd": 1056},
        sampling={"prompt": "Once upon a time"},
        saving={"every_n_steps": 5000},
    ),
    "gpt-xs": variant(
        GPT2,
        model={"block_size": 512},
        training={"micro_batch_size": 64},
        validation={"every_n_steps": 500},
        sampling={"every_n_steps": 1000},
        saving={"every_n_steps": 5000},
    ),
    "smollgpt": variant(
        GPT2,
        data={"dataset": "data/wikipedia-en"},
        model={"n_layer": 8, "n_head": 8, "tie_head": False, "dropout": 0.1},
        training={"max_steps": 33_500, "batch_tokens": 262_144, "micro_batch_size": 32},
        optimizer={"max_lr": 1.2e-3, "warmup_steps": 6_700},
        saving={"every_n_steps": 500},
    ),
}


# ---------------------------------------------------------------------------------------------------------
# from the command line to a checked config


def parse(arguments: list[str]) -> tuple[str, Config]:
    """The preset's name and the config that `[PRESET] [--SECTION.FIELD VALUE ...]` makes."""
    import tyro

    name, rest = "gpt2", arguments
    if arguments and not arguments[0].startswith("-"):
        name, rest = arguments[0], arguments[1:]
    if name not in PRESETS:
        close = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise ConfigError(f"there is no preset {name!r}.{hint} Known: {', '.join(PRESETS)}.")
    description = f"Trains, validates, evaluates and samples a GPT. Presets: {', '.join(PRESETS)}. These are {name}'s."
    preset = PRESETS[name]
    if preset.general.out_dir == OUT_PRESET:
        preset = variant(preset, general={"out_dir": Path("out") / name})
    config = tyro.cli(
        Config, default=preset, args=rest, prog=f"train.py {name}", description=description,
        console_outputs=os.environ.get("LOCAL_RANK", "0") == "0",  # of many ranks one tells a mistake
    )  # fmt: skip
    return name, config


def resolve(config: Config, world_size: int) -> tuple[Config, Dataset | None]:
    """Fills in what the data set decides and checks all fields; a ConfigError tells everything that is wrong."""
    problems, dataset = not_text(config), None
    if problems:
        raise ConfigError(problems[0])
    if {"train", "val"} & set(config.general.mode):
        try:
            dataset = open_dataset(config.data.dataset)
        except UserError as error:
            problems.append(str(error))
        else:
            if config.model.vocab_size == 0:
                config = variant(config, model={"vocab_size": dataset.vocab_size})
            elif config.model.vocab_size != dataset.vocab_size:
                problems.append(
                    f"--model.vocab-size {config.model.vocab_size} is not the {dataset.vocab_size} of "
                    f"{config.data.dataset}'s tokenizer. Leave it out (it is padded to a multiple of 128 anyhow)."
                )
            if config.model.eot_id not in (None, dataset.eot_id):
                problems.append(
                    f"--model.eot-id {config.model.eot_id} is not the {dataset.eot_id} of {config.data.dataset}. "
                    "Leave it out."
                )
            config = variant(config, model={"eot_id": dataset.eot_id if config.model.document_mask else None})
            if "val" in config.general.mode and len(dataset.val) <= config.model.block_size:
                problems.append(
                    f"{config.data.dataset} has {len(dataset.val):,} validation tokens, not one row of block_size "
                    f"{config.model.block_size:,}. Prepare it with more --val-tokens (and more than one document), "
                    "or leave val out of the mode."
                )
    problems += check(config, world_size)
    if problems:
        raise ConfigError("\n  - ".join(["the settings don't work:", *problems]) if len(problems) > 1 else problems[0])
    return config, dataset


def not_text(config: Config) -> list[str]:
    """Which fields can't be written to a file or name one, a sentence each."""
    values = {f"{s}.{name}": value for s, fields in to_json(config).items() for name, value in fields.items()}
    return [
        f"--{name.replace('_', '-')} {value!r:.50}: it has characters that no file can hold."
        for name, value in values.items()
        if isinstance(value, str) and ("\0" in value or value != value.encode("utf-8", "replace").decode())
    ]


def check(config: Config, world_size: int) -> list[str]:
    """What is wrong with the values themselves, a sentence each."""
    problems = []

    def need(condition: bool, flag: str, value: object, what: str) -> None:
        if not condition:
            problems.append(f"--{flag} {value}: {what}.")

    def at_least(low: float, section: str, *names: str) -> None:
        for name in names:
            value = getattr(getattr(config, section), name)
            need(value is None or value >= low, f"{section}.{name.replace('_', '-')}", value, f"give at least {low}")

    model, training, optimizer, sampling = config.model, config.training, config.optimizer, config.sampling
    need(len(config.general.mode) > 0, "general.mode", "()", "give at least one of train, val, eval, sample")
    seed = config.general.seed
    need(0 <= seed < 2**63, "general.seed", seed, "give a number from 0 to 2^63 - 1")
    at_least(1, "data", "chunk_tokens", "num_streams")
    at_least(1, "model", "block_size", "n_layer", "n_head", "n_embd", "n_kv_head")
    at_least(0, "model", "vocab_size")
    at_least(1, "training", "max_steps", "batch_tokens")
    at_least(0, "training", "micro_batch_size")
    at_least(1, "model", "window")
    at_least(1, "training", "skip_spikes")
    at_least(0, "training", "compare_ranks_every_n_steps")
    minutes = config.general.timeout_minutes
    need(0 < minutes <= 1e5, "general.timeout-minutes", minutes, "give more than 0, and at most 100,000")
    at_least(0, "optimizer", "max_lr", "warmup_steps", "weight_decay", "grad_clip", "embedding_lr", "head_lr")
    at_least(0, "optimizer", "scalar_lr", "momentum_warmup_steps")
    for section in ("validation", "evaluation", "sampling", "saving", "logging"):
        at_least(0, section, "every_n_steps")
    at_least(0, "saving", "keep", "keep_every")
    at_least(1, "evaluation", "limit")
    at_least(1, "sampling", "num_samples", "max_new_tokens", "top_k")
    at_least(0, "sampling", "temperature")
    can_divide = not problems
    need(0 <= model.dropout < 1, "model.dropout", model.dropout, "must be from 0 to below 1")
    need(0 <= optimizer.min_lr_ratio <= 1, "optimizer.min-lr-ratio", optimizer.min_lr_ratio, "must be from 0 to 1")
    need(0 <= optimizer.beta1 < 1, "optimizer.beta1", optimizer.beta1, "must be from 0 to below 1")
    need(0 <= optimizer.beta2 < 1, "optimizer.beta2", optimizer.beta2, "must be from 0 to below 1")
    need(optimizer.eps > 0, "optimizer.eps", optimizer.eps, "must be above 0")
    cooldown = optimizer.cooldown
    need(cooldown is None or 0 <= cooldown <= 1, "optimizer.cooldown", cooldown, "must be from 0 to 1")
    for name in ("logit_softcap", "attention_scale"):
        value = getattr(model, name)
        need(value is None or 0 < value < math.inf, f"model.{name.replace('_', '-')}", value, "must be above 0")
    top_p = sampling.top_p
    need(top_p is None or 0 < top_p <= 1, "sampling.top-p", top_p, "must be above 0, up to 1")
    if not can_divide:
        return problems
    need(model.n_embd % model.n_head == 0, "model.n-embd", model.n_embd, f"must be a multiple of n_head {model.n_head}")
    need(model.n_head % model.kv_heads == 0, "model.n-kv-head", model.n_kv_head, f"must divide n_head {model.n_head}")
    rope_fits = not model.rope or model.head_size % 4 == 0
    need(rope_fits, "model.rope", model.rope, f"needs heads of a multiple of 4 wide, not {model.head_size}")
    tables_fit = 0 <= 2 * model.value_embeddings <= model.n_layer
    half = f"give at most half of n_layer {model.n_layer}"
    need(tables_fit, "model.value-embeddings", model.value_embeddings, half)
    micro = training.micro_batch_size
    row_tokens = (micro or 1) * model.block_size * world_size
    need(
        training.batch_tokens % row_tokens == 0 or "train" not in config.general.mode,
        "training.batch-tokens",
        f"{training.batch_tokens:,}",
        "must be a multiple of "
        + (f"micro_batch_size {micro} x " if micro else "")
        + f"block_size {model.block_size:,} x {world_size} ranks = {row_tokens:,}, such as "
        + f"{max(1, training.batch_tokens // row_tokens) * row_tokens:,}"
        + ("; or change micro_batch_size" if micro else ""),
    )
    return problems


def with_micro_batch_size(config: Config, device_memory: int, world_size: int) -> Config:
    """Resolve a micro_batch_size of 0.

    It becomes the largest power of two, at most 64, whose estimated memory is under 0.8 of `device_memory` bytes, or 16
    on a CPU, where that is 0. For training, it is reduced to the largest number that divides the rows of a rank.
    """
    model, training = config.model, config.training
    if training.micro_batch_size:
        return config
    most = 16
    if device_memory:
        tables = (1 if model.tie_head else 2) + model.value_embeddings * model.kv_heads / model.n_head
        parameters = 12 * model.n_layer * model.n_embd**2 + tables * model.padded_vocab_size * model.n_embd
        row_bytes = ACTIVATION_BYTES * (1.3 if model.x0_shortcut else 1.0)  # the modern recipe keeps more
        row_bytes *= model.n_layer * model.n_embd * model.block_size
        room = 0.8 * device_memory - PARAMETER_BYTES * parameters - LOGITS_BYTES
        most = next((n for n in (64, 32, 16, 8, 4, 2) if n * row_bytes < room), 1)
    trains = "train" in config.general.mode
    rows = max(1, training.batch_tokens // model.block_size // world_size) if trains else most
    return variant(config, training={"micro_batch_size": max(n for n in range(1, most + 1) if rows % n == 0)})


def micro_batch_warning(config: Config, world_size: int) -> str | None:
    """A warning if a small micro_batch_size follows from a number of rows with few divisors, else None."""
    rows = config.training.batch_tokens // config.model.block_size // world_size
    micro = config.training.micro_batch_size
    if micro >= 8 or micro == rows or any(rows % n == 0 for n in range(micro + 1, 4 * micro + 1)):
        return None
    return (
        f"warning: micro-batches of {micro} are slow. Each rank has {rows:,} rows per step, with no larger divisor up "
        f"to {4 * micro}. Use a --training.batch-tokens with a multiple of 16 rows per rank, such as "
        f"{math.ceil(rows / 16) * 16 * world_size * config.model.block_size:,}."
    )


def to_json(config: Config) -> dict:
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))  # str: for Path


TASK_MODES = {"validation": "val", "evaluation": "eval", "sampling": "sample", "saving": "train"}  # section: mode


def due_tasks(config: Config, step: int, start: int) -> set[str]:
    """The sections of the periodic tasks that come before update `step`: every n steps and after the last one; at step
    0 only validation. What a run starts with, at step `start`, is not saved again."""
    found = set()
    for task, mode in TASK_MODES.items():
        n = getattr(config, task).every_n_steps
        if mode in config.general.mode and n > 0 and (step % n == 0 or step == config.training.max_steps):
            found.add(task)
    if step == start:
        found.discard("saving")
    return found & {"validation"} if step == 0 else found


def settings_text(config: Config) -> str:
    """The resolved settings, one line per section."""
    sections = to_json(config).items()
    return "\n".join(
        f"{section:>11}  " + "  ".join(f"{name}={value}" for name, value in values.items())
        for section, values in sections
    )


def from_json(values: dict) -> Config:
    """The config that `to_json` told; UserError where this version doesn't know a field of it."""
    try:
        sections = {field.name: dict(values[field.name]) for field in dataclasses.fields(Config)}
        general = sections["general"]
        general |= {"mode": tuple(general["mode"]), "out_dir": Path(general["out_dir"])}
        return variant(Config(), **sections)
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(f"these settings are of another version ({error}).") from None


def differences(earlier: dict, now: dict) -> list[tuple[str, object, object]]:
    """Fields (section.name, earlier value, value now) in which two configs as JSON differ."""
    keys = [(section, name) for section in now if section in earlier for name in now[section]]
    return [
        (f"{section}.{name}", earlier.get(section, {}).get(name), now[section][name])
        for section, name in keys
        if earlier.get(section, {}).get(name) != now[section][name]
    ]


def changed_settings(path: Path, config: Config) -> list[str]:
    """List the settings that differ from a run's config.json, one line each, except those of `general`."""
    return [
        f"  {name} was {earlier}, is {value} now"
        for name, earlier, value in differences(read_config(path), to_json(config))
        if not name.startswith("general.")
    ]


def read_config(path: Path) -> dict:
    """`config.json` of a run; empty where it is gone or damaged: it is a record, the checkpoints have what counts."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {name: section for name, section in found.items() if isinstance(section, dict)}
    except (OSError, ValueError, AttributeError):
        return {}


def ways_to_less_memory(config: Config, world_size: int) -> str:
    """What to change where memory was too small, the mildest first."""
    training, found = config.training, []
    rows = training.batch_tokens // config.model.block_size // world_size
    smaller = [m for m in range(1, training.micro_batch_size) if rows % m == 0]
    if smaller:
        found.append(f"--training.micro-batch-size {smaller[-1]}: the same batch in more pieces")
    if not training.activation_checkpointing:
        found.append("--training.activation-checkpointing: slower by a third or so")
    found.append("a smaller --model.block-size, or a smaller model")
    return "\n  - ".join(["Give, the mildest first:", *found])
