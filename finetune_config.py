"""The settings of finetune.py: its command line, and the config of a run."""

from collections.abc import Iterable, Set
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Literal, cast

from annotated_types import Ge, Gt, Le, Lt
from tyro.conf import Positional

from arguments import from_json
from babygpt.constraints import (
    Fraction,
    ModelArgument,
    NonNegative,
    Positive,
    PositiveFloat,
    Seed,
    flag,
    metavar,
)
from babygpt.errors import ConfigError
from babygpt.pretrained import HUB_MODELS, read_architecture
from babygpt.settings import variant
from babygpt.training import checkpoint, run_dir
from model import config_from_dict
from train_config import Config, Training, preset

CHANGEABLE = {  # settings that may change on resume: section and name in the config
    "note": ("general", "note"), "device": ("general", "device"), "max_lr": ("optimizer", "max_lr"),
    "micro_batch_size": ("training", "micro_batch_size"), "save_every": ("saving", "every_n_steps"),
    "activation_checkpointing": ("training", "activation_checkpointing"), "keep": ("saving", "keep"),
}  # fmt: skip


@dataclass(frozen=True)
class Chat:
    """The settings of finetuning that train_config.py does not have."""

    method: Literal["sft", "dpo"] = "sft"
    config: str | None = None  # of a dataset on the hub
    split: str = "train"  # of a dataset on the hub
    held_out: float = 0.1
    warmup_fraction: float = 0.05
    per_step: int = 8  # rows (SFT) or pairs (DPO)
    beta: float = 0.1
    reference: str = ""  # hash of the initial model, data and template of DPO


@dataclass(frozen=True)
class FinetuneConfig(Config):
    """All settings of a run, as in its config.json. general.init_from is the initial model, data.dataset the data."""

    chat: Chat = field(default_factory=Chat)


@dataclass(frozen=True, kw_only=True)
class FinetuneArgs:
    """The command line: each field is a flag, and its comment is the help."""

    # sft: supervised finetuning; dpo: direct preference optimization; resume: resume a run
    method: Annotated[Positional[Literal["sft", "dpo", "resume"]], metavar("{sft,dpo,resume}")]
    model: ModelArgument  # initial model; with resume, the run directory
    # jsonl or json file, dataset on the Hugging Face Hub, or prepared directory
    data: Annotated[Positional[str | None], metavar("[DATA]")] = None
    out_dir: Annotated[Path | None, metavar("PATH", "out/NAME-METHOD")] = None  # run directory
    # configuration of a dataset on the hub
    config: Annotated[str | None, metavar("NAME", "the only one")] = None
    split: Annotated[str, metavar("NAME")] = "train"  # split of a dataset on the hub
    # fraction of the prompts to hold out in val, and again in test
    held_out: Annotated[float, Ge(0), Lt(0.5), metavar("FRACTION")] = 0.1
    epochs: Annotated[float | None, Gt(0), Le(1000), metavar("N", "3 for sft, 1 for dpo")] = None  # number of epochs
    max_steps: Annotated[Positive | None, metavar("N", "epochs")] = None  # number of steps; replaces epochs
    rows: Annotated[Positive, metavar("N")] = 8  # with sft: rows of block_size tokens per step
    pairs: Annotated[Positive, metavar("N")] = 16  # with dpo: pairs per step
    block_size: Annotated[Positive | None, metavar("N", "that of the model")] = None  # context length, in tokens
    max_lr: Annotated[PositiveFloat | None, metavar("RATE", "3e-4 for sft, 5e-6 for dpo")] = None  # peak learning rate
    warmup: Fraction = 0.05  # fraction of the steps for warmup; then the learning rate decays linearly to 0
    # with dpo: strength of the penalty for leaving the initial model
    beta: Annotated[PositiveFloat, metavar("BETA")] = 0.1
    micro_batch_size: NonNegative = 0  # rows per forward pass; 0: automatic
    activation_checkpointing: bool = False  # recompute activations in the backward pass to save memory
    validate_every: NonNegative = 50  # validate and sample every N steps, and at the end; 0: never
    save_every: NonNegative = 200  # save a checkpoint every N steps, and at the end; 0: only when the run is stopped
    keep: NonNegative = 2  # number of most recent checkpoints to keep; 0: all
    seed: Seed = 1337  # seed of the order of the data
    note: Annotated[str, metavar("TEXT")] = ""  # remark about the run, shown by `python -m tools.runs`
    device: Literal["auto", "cuda", "cpu", "mps"] = "auto"  # device to run on; auto: CUDA if available, otherwise CPU
    # data type for matrix multiplications; auto: bfloat16 if the device supports it, otherwise float32
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"


def given_flags(arguments: Iterable[str]) -> set[str]:
    """Return the names of the fields of FinetuneArgs whose flags are among command-line arguments."""
    words = {argument.partition("=")[0].replace("_", "-") for argument in arguments}
    return {f.name for f in fields(FinetuneArgs) if words & {flag(f.name), flag(f"no_{f.name}")}}


def new_config(args: FinetuneArgs, given: Set[str] = frozenset()) -> FinetuneConfig:
    """Return the config of a new run. ConfigError without a model or data, or if a `given` flag has no effect."""
    if args.data is None:
        raise ConfigError(f"No data given. Use python finetune.py {args.method} {args.model} DATA.")
    architecture = asdict(preset(args.model).model) if args.model in HUB_MODELS else read_architecture(args.model)
    if architecture is None:
        raise ConfigError(f"There is no model at {args.model}. Use a run directory (out/NAME), or another model.")
    model = replace(config_from_dict(architecture), dropout=0.0)
    if args.block_size and args.block_size > model.block_size:
        raise ConfigError(
            f"--block-size {args.block_size:,} is more than that of the model. Use at most {model.block_size:,}."
        )
    model = replace(model, block_size=args.block_size or model.block_size)
    is_dpo = args.method == "dpo"
    for name in sorted(given & ({"rows"} if is_dpo else {"pairs", "beta"})):
        raise ConfigError(f"{args.method} does not use {flag(name)}. Omit it.")
    if {"epochs", "max_steps"} <= given:
        raise ConfigError("--max-steps replaces --epochs. Use one of them.")
    per_step = args.pairs if is_dpo else args.rows
    path = Path(args.model)
    if path.resolve().parent.name == "checkpoints":
        path = path.resolve().parent.parent  # for a checkpoint, the name of its run
    # general.init_from gives these two names another meaning
    initial = f"./{args.model}" if args.model in ("scratch", "resume") else args.model
    config = FinetuneConfig(
        model=model,
        chat=Chat("dpo" if is_dpo else "sft", args.config, args.split, args.held_out, args.warmup, per_step, args.beta),
    )
    return variant(
        config,
        general={
            "mode": ("train", "val", "sample"), "init_from": initial, "seed": args.seed, "device": args.device,
            "note": args.note, "preset": args.method,
            "out_dir": args.out_dir or Path("out") / f"{path.name.removesuffix('.pt')}-{args.method}",
        },
        data={"dataset": args.data},
        training={
            "epochs": None if args.max_steps else args.epochs or (1.0 if is_dpo else 3.0),
            "max_steps": args.max_steps or Training.max_steps, "dtype": args.dtype, "compile": "off",
            "batch_tokens": per_step * model.block_size * (2 if is_dpo else 1),  # at most, with dpo
            "micro_batch_size": args.micro_batch_size, "activation_checkpointing": args.activation_checkpointing,
        },
        optimizer={
            "max_lr": args.max_lr or (5e-6 if is_dpo else 3e-4), "min_lr_ratio": 0.0, "weight_decay": 0.0,
            "cooldown": 1.0 - args.warmup,
        },
        validation={"every_n_steps": args.validate_every},
        evaluation={"every_n_steps": 0},
        sampling={"every_n_steps": args.validate_every, "num_samples": 3, "max_new_tokens": 100, "temperature": 0.7},
        saving={"every_n_steps": args.save_every, "keep": args.keep},
    )  # fmt: skip


def resumed_config(args: FinetuneArgs, given: Set[str] = frozenset()) -> FinetuneConfig:
    """Return the config of the run directory `args.model`, with the `given` settings.

    ConfigError if it is not a run of this script, or if a setting may not change.
    """
    fixed = [*(["DATA"] if args.data else []), *map(flag, sorted(given - CHANGEABLE.keys()))]
    if fixed:
        raise ConfigError(
            f"A run resumes with its own settings. Omit {', '.join(fixed)}. Only {', '.join(map(flag, CHANGEABLE))} "
            "may change."
        )
    out = Path(args.model)
    settings = run_dir.read_config(out / "config.json")
    if "chat" not in settings:
        raise ConfigError(f"{out} is not a run of finetune.py. Use the directory of one, such as out/gpt2-sft.")
    config = cast(FinetuneConfig, from_json(settings, FinetuneConfig()))
    for name in sorted(given):
        section, setting = CHANGEABLE[name]
        config = variant(config, **{section: {setting: getattr(args, name)}})
    initial = {} if checkpoint.list_checkpoints(out) else {"init_from": settings["general"]["init_from"]}
    return variant(config, general={"out_dir": out, "init_from": "resume"} | initial)
