"""Launch a run: its initial weights, or the checkpoint from which it resumes, and the record of its settings."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torch import manual_seed

from arguments import to_json
from babygpt import files
from babygpt.console import console
from babygpt.data.tokenizer import Tokenizer
from babygpt.errors import ConfigError
from babygpt.pretrained import Pretrained, read_pretrained
from babygpt.settings import variant
from babygpt.training import checkpoint, run_dir
from babygpt.training.distributed import Ranks
from dataloader import Position
from model import GPT, build_model
from train_config import PRESETS, Config


@dataclass
class InitialState:
    """The state in which training starts, new or from a checkpoint."""

    model: GPT
    init_from: str  # "scratch" or the source of the initial weights, also after a resume
    checkpoint: Path | None = None  # that the run resumes from; None: a new run
    optimizer_state: dict | None = None  # by parameter name; None: new
    step: int = 0
    tokens: int = 0  # number of tokens trained on so far
    position: Position = field(default_factory=Position)
    losses: list[float] = field(default_factory=list)  # recent losses, to restore the guard
    launches: list[dict] = field(default_factory=list)  # one per launch: first step, settings, versions, hardware


def restore_or_initialize(
    config: Config, identity: dict[str, dict], adapt: Callable[[Pretrained], Pretrained], ranks: Ranks
) -> InitialState:
    """Return the state in which training starts, from --general.init-from; `adapt` is applied to weights of a model.

    ConfigError if the `identity` of the run is not that of the checkpoint from which it resumes.
    """
    out, init_from, path = config.general.out_dir, config.general.init_from, None
    if init_from == "resume":
        path = run_dir.latest_checkpoint(out, ranks)
        # without a checkpoint, start from the initial weights of the run or, in a new directory, of the preset
        new = PRESETS.get(config.general.preset, {}).get("general", {}).get("init_from", "scratch")
        init_from = run_dir.read_config(out / "config.json").get("general", {}).get("init_from", new)
    elif (out / run_dir.FINISHED).exists() or checkpoint.list_checkpoints(out):
        raise ConfigError(
            f"{out} already contains a run. Resume it with `{run_dir.resume_command(out)}`, or start another run "
            "with a different --out-dir."
        )
    manual_seed(config.general.seed)  # the same initial weights on all ranks
    if path:
        return restore(path, init_from, config, identity)
    if init_from == "scratch":
        return InitialState(build_model(config.model), init_from)
    console.info(f"Starting from the weights of {init_from}")
    weights = ranks.main_process_first(lambda: read_pretrained(init_from))
    return InitialState(adapt(weights).build(lambda _: build_model(config.model)), init_from)


def restore(path: Path, init_from: str, config: Config, identity: dict[str, dict]) -> InitialState:
    """Load a checkpoint to resume from. ConfigError if its identity is not that of this run."""
    loaded = checkpoint.load(path)
    try:
        state = loaded.state
        run_dir.check_identity(path, state, identity)
        step, tokens, position = state["step"], state["tokens"], Position(**state["position"])
        losses, launches = [float(loss) for loss in state["losses"]], [{**launch} for launch in state["launches"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"The run cannot resume from {path} ({error!r:.200}). Delete it to resume from an earlier checkpoint."
        ) from None
    if step > config.training.max_steps:
        raise ConfigError(
            f"{path} is past --max-steps {config.training.max_steps:,}. Increase --max-steps, or use a different "
            "--out-dir."
        )
    console.info(f"Resuming from {path}")
    model = build_model(config.model)
    checkpoint.load_model_tensors(model, loaded.model)
    return InitialState(model, init_from, path, loaded.optimizer, step, tokens, position, losses, launches)


def record_start(config: Config, start: InitialState, tokenizer: Tokenizer, ranks: Ranks) -> None:
    """Print the settings that change on resume, and write config.json and the tokenizer."""
    out, settings = config.general.out_dir, to_json(variant(config, general={"init_from": start.init_from}))
    changed = run_dir.changed_settings(out / "config.json", settings) if start.checkpoint else []
    for line in ["Settings that differ from those of the last launch:", *changed] if changed else []:
        console.info(line)
    run_dir.record_launch(start.launches, start.step, settings, ranks)
    ranks.barrier()  # rank 0 must not write to the directory until all ranks have read it
    if ranks.is_main:
        (out / run_dir.FINISHED).unlink(missing_ok=True)
        if start.checkpoint is None:  # on resume, the next save replaces it
            files.write_json(out / "config.json", settings)
        if tokenizer.name != "gpt2":
            files.write(out / tokenizer.name, tokenizer.data)
