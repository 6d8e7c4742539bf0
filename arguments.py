"""From the command line to a checked config: parse the flags, check the values, and resolve the automatic ones.

>>> name, config = parse(["demo", "--max-steps", "100"])
>>> config = resolve(config, world_size=1)          # checks everything that needs no files
>>> config = bind(config, open_dataset("data/demo"))
"""

import itertools
import json
import math
import os
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from babygpt.console import console
from babygpt.constraints import flag, parse_command_line, summary, violations
from babygpt.data.shards import Dataset
from babygpt.errors import ConfigError, UserError, suggest
from babygpt.pretrained import HUB_MODELS, read_architecture
from babygpt.settings import expand_flags, flag_values, section_items, variant
from babygpt.training.memory import ACTIVATION_BYTES, largest_divisor, max_rows
from babygpt.training.run_dir import with_order
from dataloader import default_chunk_tokens, default_num_streams, rows_per_epoch
from model import GPTConfig, ModernConfig, config_from_dict
from train_config import FIELDS, MODERN_FIELDS, PRESETS, Config, preset

DEFAULTS = Config()
# fields that a run resolves itself if they have these values
AUTOMATIC: dict[str, Any] = {
    "model.vocab_size": 0, "model.eot_id": None, "data.chunk_tokens": None, "data.num_streams": None,
    "training.micro_batch_size": 0, "training.compile": "auto", "optimizer.beta1": None, "optimizer.momentum": None,
}  # fmt: skip
# fields that a run may have derived from another one, and that are derived again if a flag changes it
DERIVED = {
    "data.dataset": ("data.chunk_tokens", "data.num_streams"),
    "data.num_streams": ("data.chunk_tokens",),
    "model.block_size": ("data.chunk_tokens", "data.num_streams", "training.micro_batch_size"),
    "training.batch_tokens": ("training.micro_batch_size", "optimizer.beta1", "optimizer.momentum"),
}


def initial_config(name: str | None, flags: list[str]) -> Config:
    """Return the config to which the flags are applied: that of a preset, or that of a run.

    It is that of a run if `name` is the path of its config.json, or if no name is given and the flags resume or
    evaluate the run in --general.out-dir. Weights in --general.init-from determine the architecture.
    """
    init_from = (flag_values(flags, "general.init-from") or ["scratch"])[0]
    out_dir = (flag_values(flags, "general.out-dir") or ["out/gpt2"])[0]
    trains = "train" in (flag_values(flags, "general.mode") or ["train"])
    continues = init_from == "resume" or (init_from == "scratch" and not trains)
    if name is None and continues and (path := Path(out_dir) / "config.json").exists():
        config = variant(read_settings(path), general={"init_from": "resume"})
        print_differences(config)
    elif name is not None and name.endswith(".json"):
        config = read_settings(Path(name))
        weights, is_new = config.general.init_from, not (Path(out_dir) / "config.json").exists()
        if init_from == "resume" and flag_values(flags, "general.out-dir") and is_new and weights != "scratch":
            raise ConfigError(
                f"{name} is of a run that started from {weights}, but there is no run in {out_dir} to resume. Use "
                f"--general.init-from {weights} for the first launch."
            )
        if continues:
            config = variant(config, general={"init_from": "resume"})
        else:
            config = variant(config, general={"out_dir": next_free(config.general.out_dir)})
            for changed, derived in DERIVED.items():
                if flag_values(flags, changed):
                    for section, field in (key.split(".") for key in derived):
                        config = variant(config, **{section: {field: AUTOMATIC[f"{section}.{field}"]}})
    elif name in (None, *PRESETS):
        config = preset(name or "gpt2")
    else:
        if name and (Path(name) / "config.json").exists():
            raise ConfigError(f"{name} is a run, not a preset. Use {name}/config.json.")
        raise ConfigError(f"There is no preset {name!r}. {suggest(name, PRESETS)}")
    if trains and init_from not in ("scratch", "resume"):
        architecture = preset(init_from).model if init_from in HUB_MODELS else read_architecture(init_from)
        if architecture is not None:
            model = architecture if isinstance(architecture, GPTConfig) else config_from_dict(architecture)
            config = unbound(replace(config, model=replace(model, dropout=config.model.dropout)))
    return config


def unbound(config: Config) -> Config:
    """Return the config without the values that `bind` takes from the dataset, except for the order of the data."""
    eot_id = {"eot_id": None} if isinstance(config.model, ModernConfig) else {}
    return variant(config, model={"vocab_size": 0, **eot_id})


def read_settings(path: Path) -> Config:
    """Return the settings in the config.json of a run. A micro_batch_size that does not divide the rows is unset."""
    try:
        config = unbound(from_json(json.loads(path.read_text(encoding="utf-8"))))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"{path} cannot be read as the config.json of a run ({reason}). Use another path, or a preset."
        ) from None
    except UserError as error:
        raise ConfigError(f"{path}: {error}") from None
    if problems := violations(config):
        raise ConfigError(summary(problems, f"{path} is invalid:"))
    rows = config.training.batch_tokens // config.model.block_size // int(os.environ.get("WORLD_SIZE", "1"))
    fits = config.training.micro_batch_size and rows % config.training.micro_batch_size == 0
    micro_batch_size = config.training.micro_batch_size if fits else 0  # of another number of ranks
    return variant(config, general={"out_dir": path.parent}, training={"micro_batch_size": micro_batch_size})


def next_free(directory: Path) -> Path:
    """Return the first of directory-2, directory-3, ... that does not exist."""
    numbers = itertools.count(2)
    return next(path for n in numbers if not (path := directory.with_name(f"{directory.name}-{n}")).exists())


def print_differences(config: Config) -> None:
    """Print the settings in which a run differs from its preset."""
    if os.environ.get("RANK", "0") != "0":
        return
    name = config.general.preset
    console.info(f"The settings are those of {config.general.out_dir}/config.json.")
    if name in PRESETS:
        now = {f"{section}.{field}": value for section, field, value in section_items(preset(name))}
        lines = [
            f"  {key}: {value!r} in this run, {now[key]!r} in the preset"
            for section, field, value in section_items(config)
            if section != "general" and (key := f"{section}.{field}") in now
            and value != now[key] and (key not in AUTOMATIC or now[key] != AUTOMATIC[key])
        ]  # fmt: skip
        for line in [f"These settings differ from the preset {name} in train_config.py:", *lines] if lines else []:
            console.info(line)


def parse(arguments: list[str]) -> tuple[str, Config]:
    """Return the name of the preset and the config of `[PRESET | CONFIG.json] [--[SECTION.]FIELD VALUE ...]`."""
    name, rest = None, arguments
    if arguments and not arguments[0].startswith("-"):
        name, rest = arguments[0], arguments[1:]
    rest = expand_flags(rest, FIELDS)
    defaults = initial_config(name, rest)
    name = defaults.general.preset
    if flag_values(rest, "training.max-steps"):
        if (flag_values(rest, "training.epochs") or ["None"]) != ["None"]:
            raise ConfigError("--training.epochs replaces --training.max-steps. Use one of them.")
        defaults = variant(defaults, training={"epochs": None})
    modern_flags = {flag(f"model.{prefix}{field}") for field in MODERN_FIELDS for prefix in ("", "no-")}
    if not isinstance(defaults.model, ModernConfig) and (
        used := modern_flags & {word.split("=")[0].replace("_", "-") for word in rest}
    ):
        raise ConfigError(
            f"{', '.join(sorted(used))}: the model of {name or 'this run'} is a classic GPT-2 without these settings. "
            "Use the preset modern: python train.py modern ..."
        )
    presets = f"{', '.join(PRESETS)}, or the path of a run's config.json"
    preset_argument = tyro.conf.arg(metavar="[PRESET]", help=presets, help_behavior_hint="(default: gpt2)")

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
    training, num_tokens = config.training, len(dataset.train)
    num_streams = data.num_streams or default_num_streams(num_tokens, model.block_size)
    chunk_tokens = data.chunk_tokens or default_chunk_tokens(num_tokens, num_streams, model.block_size)
    if training.epochs is not None:
        steps_per_epoch = rows_per_epoch(num_tokens, num_streams, model.block_size) // (
            training.batch_tokens // model.block_size
        )
        config = variant(config, training={"max_steps": max(1, round(training.epochs * steps_per_epoch))})
    return variant(config, data={"num_streams": num_streams, "chunk_tokens": chunk_tokens})


def with_micro_batch_size(config: Config, device_memory: int, world_size: int) -> Config:
    """Resolve a micro_batch_size of 0 for a device with this memory in bytes, 0 for a CPU.

    For training, it is the largest divisor of the rows per rank that fits.
    """
    model, training = config.model, config.training
    if training.micro_batch_size:
        return config
    tables = (1.0 if model.tie_head else 2.0) + getattr(model, "bigram_tables", 0)
    tables += getattr(model, "value_embeddings", 0) * model.kv_heads / model.n_head
    parameters = 12 * model.n_layer * model.n_embd**2 + tables * model.padded_vocab_size * model.n_embd
    bytes_per_channel = ACTIVATION_BYTES * (1.3 if isinstance(model, ModernConfig) else 1.0)
    limit = max_rows(device_memory, parameters, bytes_per_channel * model.n_layer * model.n_embd * model.block_size)
    trains = "train" in config.general.mode
    rows = max(1, training.batch_tokens // model.block_size // world_size) if trains else limit
    return variant(config, training={"micro_batch_size": largest_divisor(rows, limit)})


# ---------------------------------------------------------------------------------------------------------
# config.json


def to_json(config: Config) -> dict[str, dict[str, Any]]:
    return json.loads(json.dumps(asdict(config), default=str))  # str: for Path


def from_json(values: dict[str, Any], defaults: Config = DEFAULTS) -> Config:
    """Return the config from the output of `to_json`. UserError if its sections are not those of `defaults`."""
    if "chat" in values and not hasattr(defaults, "chat"):
        raise UserError("It is a run of finetune.py. Resume it with `python finetune.py resume RUN`.")
    try:
        sections = with_order({field.name: values[field.name] for field in fields(defaults)})
        general, evaluation = sections["general"], sections["evaluation"]
        general |= {"mode": tuple(general["mode"]), "out_dir": Path(general["out_dir"])}
        evaluation["tasks"] = tuple(evaluation.get("tasks", ()))
        model = config_from_dict(sections.pop("model"))
        return variant(replace(defaults, model=model), **sections)
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(f"A different version of BabyGPT wrote the settings ({error}). Use that version.") from None
