"""All settings of a run: the one file to edit. Each field is also a flag; `python train.py --help` lists them.

    python train.py                                    # the preset gpt2
    python train.py demo --max-steps 100               # another preset, with one field changed
    python train.py out/demo/config.json --seed 2      # the settings of a run, with one field changed

Each section is a dataclass. PRESETS lists the fields in which a preset differs from the defaults. An `every_n_steps` of
0 means never. A field can be a flag without its section, if no other section has a field of this name.
"""

from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from annotated_types import Ge, Gt, Le, Lt, MinLen

from babygpt.constraints import Fraction, NonNegative, Positive, Probability, Seed, metavar, violations
from babygpt.errors import ConfigError
from babygpt.evaluation.tasks import TaskName
from babygpt.settings import unknown_names, variant
from model import GPTConfig, ModernConfig

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
    # initial weights: scratch (random), resume (the latest checkpoint in out_dir; if there is none, the initial weights
    # of the run or preset), gpt2, gpt2-medium, gpt2-large or gpt2-xl (from the Hugging Face Hub), or a path to a model
    init_from: Annotated[str, metavar("WEIGHTS")] = "scratch"
    out_dir: Path = OUT_PRESET  # run directory
    seed: Seed = 1337  # seed for the initial weights, the data order, and dropout
    device: Literal["auto", "cuda", "cpu", "mps"] = "auto"  # device to run on; auto: CUDA if available, otherwise CPU
    deterministic: bool = False  # use only deterministic CUDA kernels, which are slower
    # minutes that a rank waits for the other ranks before it aborts
    timeout_minutes: Annotated[float, Gt(0), Le(100_000), metavar("MINUTES")] = 30.0
    note: Annotated[str, metavar("TEXT")] = ""  # remark about the run, shown by `python -m tools.runs`
    preset: Annotated[str, tyro.conf.Suppress] = ""  # name of the preset that the run started from; not a flag


@dataclass(frozen=True)
class Data:
    """Dataset and data order."""

    dataset: Annotated[str, metavar("PATH")] = "data/fineweb-edu-10BT"  # dataset directory, prepared by fineweb.py
    # approximate length of the chunks that are shuffled, in tokens
    chunk_tokens: Annotated[
        Positive | None, metavar("TOKENS", "1/16 of a stream, or 1/16384 of the data; 4 rows to 1M tokens")
    ] = None
    # number of equal parts of the shuffled data that are read in parallel
    num_streams: Annotated[Positive | None, metavar("N", "4096, or fewer for a small dataset")] = None
    # version of the data order; 1: that of earlier runs, which takes the streams in ascending order
    order: Literal[1, 2] = 2


@dataclass(frozen=True)
class Training:
    """Training loop."""

    # number of optimizer steps; 19,073 steps of 524,288 tokens are 10B tokens
    max_steps: Annotated[Positive, metavar("N")] = 19_073
    # number of epochs; replaces max_steps
    epochs: Annotated[float | None, Gt(0), Le(1_000_000), metavar("EPOCHS", "off")] = None
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
    embedding_lr: Rate = 0.6  # with muon: peak learning rate of embeddings, except wte if it is tied to lm_head
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
    """Accuracy on HellaSwag, and scores of other tasks."""

    every_n_steps: Steps = 250  # evaluate every N steps and after the last step; 0: never
    style: Literal["karpathy", "lm-eval"] = "karpathy"  # scoring method; log.csv records acc_norm only with karpathy
    # examples in HellaSwag's jsonl format
    file: Annotated[str | None, metavar("PATH|URL", "HellaSwag's validation set, downloaded once")] = None
    # language of the examples: en, or de, fr, pl, ... for a translation (openGPT-X/hellaswagx on the Hugging Face Hub)
    language: Annotated[str, metavar("CODE")] = "en"
    limit: Annotated[Positive | None, metavar("N", "all examples")] = None  # evaluate only the first N examples
    # tasks besides HellaSwag, evaluated at the same steps, as in lm-evaluation-harness: arc_easy, piqa, sciq, lambada,
    # blimp
    tasks: Annotated[tuple[TaskName, ...], metavar("TASK [TASK ...]", "none")] = ()


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
    """Console output and trackers. log.csv records every step."""

    every_n_steps: Steps = 1  # print a line every N steps; 0: never
    # also log to TensorBoard or Weights & Biases (pip install tensorboard, or wandb)
    tracker: Annotated[Literal["tensorboard", "wandb"] | None, metavar("tensorboard|wandb", "none")] = None


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
    "bias": False, "rope": True, "qk_norm": True, "attention_score_factor": 1.44, "partial_key_offset": True,
    "relu2": True, "embedding_norm": True, "value_embeddings": 2, "bigram_tables": 5, "x0_shortcut": True,
}  # fmt: skip
MODERN_OPTIMIZER: dict[str, Any] = {
    "name": "muon", "normuon": True, "max_lr": 0.04, "min_lr_ratio": 0.0, "warmup_steps": 0, "cooldown": 0.3,
    "eps": 1e-10, "weight_decay": 0.0, "grad_clip": 0.0,
}  # fmt: skip
DEMO_MODEL: dict[str, Any] = {"block_size": 256, "n_layer": 4, "n_head": 4, "n_embd": 192}
DEMO: dict[str, dict[str, Any]] = {
    "data": {"dataset": "data/demo"},
    "training": {"max_steps": 400, "batch_tokens": 4096, "compile": "off"},
    "validation": {"every_n_steps": 40},
    "evaluation": {"every_n_steps": 400, "limit": 200},
    "sampling": {"every_n_steps": 200, "prompt": "def ", "num_samples": 2, "temperature": 0.8},
    "saving": {"every_n_steps": 200},
    "logging": {"every_n_steps": 10},
}

SHAKESPEARE: dict[str, dict[str, Any]] = {
    "general": {"mode": ("train", "val", "sample")},
    "data": {"dataset": "data/shakespeare-char"},
    "validation": {"every_n_steps": 250},
    "sampling": {"every_n_steps": 500, "prompt": "\n", "num_samples": 2, "max_new_tokens": 300, "temperature": 0.8},
    "saving": {"every_n_steps": 500},
    "logging": {"every_n_steps": 10},
}


def small_modern(
    block_size: int, n_layer: int, n_head: int, n_embd: int, batch_tokens: int, max_steps: int
) -> dict[str, dict[str, Any]]:
    """Return a preset with the recipe of modern in this size.

    It does not evaluate on HellaSwag, where such models score at chance level.
    """
    shape = {"block_size": block_size, "n_layer": n_layer, "n_head": n_head, "n_embd": n_embd}
    return {
        "general": {"mode": ("train", "val", "sample")},
        "model": MODERN_MODEL | shape,
        "training": {"max_steps": max_steps, "batch_tokens": batch_tokens},
        "optimizer": MODERN_OPTIMIZER,
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
    # the recipe of modern in smaller sizes: about 3M, 11M and 32M parameters excluding embeddings
    "tiny": small_modern(256, 4, 4, 256, batch_tokens=4_096, max_steps=2_000),
    "mini": small_modern(512, 6, 6, 384, batch_tokens=16_384, max_steps=3_000),
    "small": small_modern(512, 8, 9, 576, batch_tokens=65_536, max_steps=4_000),
    # nanoGPT's settings for tiny Shakespeare: on a CPU, on a GPU, and from GPT-2's weights; and the recipe of modern
    "shakespeare-char-cpu": SHAKESPEARE
    | {
        "model": {"block_size": 64, "n_layer": 4, "n_head": 4, "n_embd": 128, "bias": False},
        "training": {"max_steps": 2000, "batch_tokens": 768},
        "optimizer": {"max_lr": 1e-3, "beta2": 0.99, "warmup_steps": 100},
    },
    "shakespeare-char": SHAKESPEARE
    | {
        "model": {"block_size": 256, "n_layer": 6, "n_head": 6, "n_embd": 384, "dropout": 0.2, "bias": False},
        "training": {"max_steps": 5000, "batch_tokens": 16_384},
        "optimizer": {"max_lr": 1e-3, "beta2": 0.99, "warmup_steps": 100},
    },
    "shakespeare-modern": SHAKESPEARE
    | {
        "model": MODERN_MODEL | {"block_size": 64, "n_layer": 4, "n_head": 4, "n_embd": 128, "tie_head": False},
        "training": {"max_steps": 2000, "batch_tokens": 768},
        "optimizer": MODERN_OPTIMIZER | {"max_lr": 0.02, "embedding_lr": 0.3, "head_lr": 0.004, "scalar_lr": 0.02},
    },
    "finetune-shakespeare": SHAKESPEARE
    | {
        "general": {"mode": ("train", "val", "sample"), "init_from": "gpt2"},
        "data": {"dataset": "data/shakespeare"},
        "training": {"max_steps": 20, "batch_tokens": 32_768},
        "optimizer": {"max_lr": 3e-5, "min_lr_ratio": 1.0, "warmup_steps": 0},
        "validation": {"every_n_steps": 5},
        "sampling": {"every_n_steps": 20, "prompt": "\n", "max_new_tokens": 200, "temperature": 0.8},
        "saving": {"every_n_steps": 0},
    },
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


MODERN_FIELDS = {f.name for f in fields(ModernConfig)} - {f.name for f in fields(GPTConfig)}
FIELDS = {  # by section
    section.name: [f.name for f in fields(ModernConfig if section.name == "model" else getattr(Config(), section.name))]
    for section in fields(Config)
}


def preset(name: str) -> Config:
    """Return the config of a preset. Its model is a ModernConfig if it sets a field that only ModernConfig has."""
    sections = PRESETS[name]
    config = Config()
    model = sections.get("model")
    if isinstance(model, dict) and MODERN_FIELDS & model.keys():
        config = replace(config, model=ModernConfig(**asdict(config.model)))
    problems = unknown_names(sections, FIELDS)
    if not problems:
        config = variant(config, **sections)
        problems = violations(config)
    if problems:
        raise ConfigError("\n  ".join([f"The preset {name!r} in train_config.py is invalid:", *problems]))
    out_dir = Path(str(config.general.out_dir).replace("PRESET", name))
    return variant(config, general={"out_dir": out_dir, "preset": name})


def fitting_preset(num_tokens: int, is_character_level: bool, has_gpu: bool) -> str:
    """Return the preset for a dataset of `num_tokens` training tokens.

    With a GPU, it is the largest of mini, small and gpt2 whose run reads at most 4 epochs, otherwise tiny.
    """
    if is_character_level:
        return "shakespeare-char" if has_gpu else "shakespeare-char-cpu"
    larger = [name for name in ("mini", "small", "gpt2") if tokens_of(preset(name)) <= 4 * num_tokens]
    return ["tiny", *larger][-1] if has_gpu else "tiny"


def tokens_of(config: Config) -> int:
    """Return the number of tokens that a run reads."""
    return config.training.max_steps * config.training.batch_tokens
