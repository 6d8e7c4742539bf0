"""How a run begins: from scratch, from its own last checkpoint, or from other weights; and what is refused.

python train.py gpt2                                 # scratch; refused where a run is already
python train.py gpt2 --general.init-from resume      # the last checkpoint, or scratch where there is none
python train.py gpt2 --general.init-from gpt2        # OpenAI's weights, a Hugging Face folder, another run
"""

import fcntl
import functools
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TextIO

import torch

from babygpt.data.shards import Dataset, write_json
from babygpt.data.tokenizer import Tokenizer
from babygpt.errors import ConfigError
from babygpt.training import checkpoint
from babygpt.training.device import uses_bfloat16
from babygpt.training.distributed import Ranks
from dataloader import Order, Position
from model import GPT, config_of
from train_config import Config, differences, read_config, to_json, variant

# empty files in a run's folder, for scripts: it has done all its steps, or was told to stop and has saved
FINISHED, STOPPED = "finished", "stopped"
LOCK = ".lock"  # held by the process that trains in the folder


@dataclass
class Start:
    """What the loop begins with. `position` is the place in the data, `tokens` were trained on before, `losses` are the
    last ones. `launches` say from which step on the run was trained with which settings, versions and machine."""

    model: GPT
    optimizer: dict | None  # tensors to put into it, of a resumed run
    step: int
    tokens: int
    position: Position
    losses: list[float] = field(default_factory=list)
    launches: list[dict] = field(default_factory=list)


@contextmanager
def claim(out: Path, ranks: Ranks) -> Iterator[None]:
    """Makes a run's folder and keeps other processes from training in it meanwhile; ConfigError where one does."""

    def lock() -> TextIO | None:
        if not ranks.is_main:
            return None
        if out.exists() and not out.is_dir():
            raise ConfigError(f"--general.out-dir {out} is a file.")
        try:
            out.mkdir(parents=True, exist_ok=True)
            file = open(out / LOCK, "w")  # noqa: SIM115, held as long as the run
        except OSError as error:
            raise ConfigError(f"--general.out-dir {out} can't be written to ({error}).") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise ConfigError(f"another process trains in {out} now. Give another --general.out-dir.") from None
        except OSError:  # a file system without locks
            pass
        if not (out / LOCK).exists():  # a run that was refused has just deleted it
            file.close()
            return lock()
        (out / STOPPED).unlink(missing_ok=True)
        return file

    file = ranks.main_first(lock)
    try:
        yield
    finally:
        if file is not None:
            if out.exists() and os.listdir(out) == [LOCK]:  # the run was refused
                (out / LOCK).unlink()
                out.rmdir()
            file.close()


def begin(config: Config, dataset: Dataset, order: Order, tokenizer: Tokenizer, ranks: Ranks) -> Start:
    """The weights and the place to begin at, as --general.init-from says; writes config.json."""
    out, init_from = Path(config.general.out_dir), config.general.init_from
    found = None
    if init_from == "resume":
        found = checkpoint.latest(out)
        # what the run began from is what it begins from again, if it was killed before its first checkpoint
        init_from = read_config(out / "config.json").get("general", {}).get("init_from", "scratch")
    elif (out / "config.json").exists() or checkpoint.checkpoints(out):
        raise ConfigError(
            f"{out} holds a run already. Go on with it: --general.init-from resume, or begin another beside it: "
            "--general.out-dir out/NAME."
        )
    if len(places := set(ranks.gather(checkpoint.step_of(found) if found else -1))) > 1:
        raise ConfigError(f"the ranks see different checkpoints in {out} (steps {sorted(map(int, places))}): share it.")
    if config.general.init_from == "resume" and found is None and checkpoint.checkpoints(out):
        raise ConfigError(f"none of the {len(checkpoint.checkpoints(out))} checkpoints of {out} is sound.")
    torch.manual_seed(config.general.seed)
    if found:
        try:
            start = _resumed(found, config, identity(config, dataset, order, tokenizer), ranks)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"{found} lacks what a run goes on with ({error!r:.200}).") from None
    elif init_from == "scratch":
        start = Start(GPT(config.model), None, 0, 0, Position())
    else:
        ranks.print(f"beginning with the weights of {init_from}")
        loaded = ranks.main_first(lambda: GPT.from_pretrained(init_from))
        if loaded.tokenizer.sha256 != tokenizer.sha256:
            raise ConfigError(f"the weights of {init_from} know another tokenizer than {dataset.folder}.")
        start = Start(_fitted(loaded, config, init_from), None, 0, 0, Position())

    settings = to_json(variant(config, general={"init_from": init_from}))
    launch = {"config": settings, "made_by": made_by(ranks)}
    if not start.launches or start.launches[-1] | launch != start.launches[-1]:
        start.launches.append({"step": start.step} | launch)
    ranks.wait()  # all have looked at the folder before rank 0 writes to it
    if ranks.is_main:
        (out / FINISHED).unlink(missing_ok=True)
        if found is None:  # else it stays the last checkpoint's until the next one
            write_json(out / "config.json", settings)
        if tokenizer.name != "gpt2":
            shutil.copyfile(tokenizer.file, out / tokenizer.name)
    return start


def _resumed(found: Path, config: Config, now: dict, ranks: Ranks) -> Start:
    """A checkpoint's weights, optimizer and place; ConfigError where model or data are not the run's."""
    loaded = checkpoint.load(found)
    # with what was added since it was written
    state = {"optimizer": {"name": "adamw"}, "losses": [], "launches": []} | loaded.state
    state["model"] = asdict(config_of(state))
    wrong = [
        f"  {section}.{name}: {state[section].get(name)} there, {value} now\n"
        for section, values in now.items()
        for name, value in values.items()
        if state[section].get(name) != value
    ]
    if wrong:
        raise ConfigError(
            f"{found} can't be gone on with: model, optimizer and order of the data must stay.\n{''.join(wrong)}"
            "Give the earlier values, or begin anew with another --general.out-dir."
        )
    if state["step"] > config.training.max_steps:
        raise ConfigError(
            f"{found} is beyond --training.max-steps {config.training.max_steps:,} already. Give more steps, or "
            "another --general.out-dir."
        )
    ranks.print(f"resuming {found}")
    for name, earlier, value in differences(read_config(found.parent.parent / "config.json"), to_json(config)):
        if not name.startswith("general."):
            ranks.print(f"  {name} was {earlier}, is {value} now")
    model = GPT(config.model)
    checkpoint.load_model_tensors(model, loaded.model)
    return Start(
        model, loaded.optimizer, state["step"], state["tokens"], Position(**state["position"]),
        [float(loss) for loss in state["losses"]], [{**launch} for launch in state["launches"]],
    )  # fmt: skip


def _fitted(loaded: GPT, config: Config, init_from: str) -> GPT:
    """Weights from elsewhere in a model of this run's settings; ConfigError where they don't fit."""
    theirs, ours = asdict(loaded.config), asdict(config.model)
    free = {"dropout"}
    if ours["block_size"] < theirs["block_size"]:
        free.add("block_size")  # the first positions are kept
    differing = [name for name in ours if theirs[name] != ours[name] and name not in free]
    if differing:
        raise ConfigError(
            f"the weights of {init_from} are of another architecture:\n"
            + "".join(f"  {name}: {theirs[name]} there, {ours[name]} here\n" for name in differing)
            + "Give the preset or the flags that fit them."
        )
    model, tensors = GPT(config.model), checkpoint.model_tensors(loaded)
    if "wpe.weight" in tensors:
        tensors["wpe.weight"] = tensors["wpe.weight"][: config.model.block_size]
    checkpoint.load_model_tensors(model, tensors)
    return model


def describe(config: Config, order: Order, model: GPT, ranks: Ranks) -> None:
    """Prints the resolved settings and what follows from them."""
    for section, values in to_json(config).items():
        ranks.print(f"{section:>11}  " + "  ".join(f"{name}={value}" for name, value in values.items()))
    training, rows = config.training, config.training.batch_tokens // config.model.block_size
    steps = order.rows_per_epoch // rows
    unread = len(order.tokens) - steps * training.batch_tokens
    ranks.print(
        f"{model.num_params():,} parameters on {ranks.world_size} x {ranks.device.type}, "
        f"{training.batch_tokens:,} tokens a step in "
        f"{rows // (training.micro_batch_size * ranks.world_size)} micro-batches a rank\n"
        f"{len(order.tokens):,} tokens in {len(order.cuts):,} chunks of about {order.chunk_tokens:,}\n"
        f"{steps:,} steps an epoch ({unread:,} tokens unread in each), "
        f"{training.max_steps / steps:.2f} epochs in {training.max_steps:,} steps"
    )
    if order.forced_cuts:
        ranks.print(f"{order.forced_cuts:,} chunks begin inside a document: no end of text was near")


def identity(config: Config, dataset: Dataset, order: Order, tokenizer: Tokenizer) -> dict:
    """What a run can't change when it is resumed: architecture, optimizer, data and their order."""
    return {
        "model": asdict(config.model),
        "data": {
            "fingerprint": dataset.fingerprint, "block_size": order.block_size, "num_streams": order.num_streams,
            "chunk_tokens": order.chunk_tokens, "seed": order.seed,
        },
        "tokenizer": {"name": tokenizer.name, "sha256": tokenizer.sha256},
        "optimizer": {"name": config.optimizer.name},
    }  # fmt: skip


def made_by(ranks: Ranks) -> dict:
    """What decides about the last bits of a run's numbers: versions, device, ranks and threads."""
    cuda = ranks.device.type == "cuda"
    return {
        "commit": _commit(), "python": platform.python_version(), "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if cuda else torch.backends.cpu.get_cpu_capability(),
        "bfloat16": uses_bfloat16(ranks.device, "auto"),
        "ranks": ranks.world_size, "threads": torch.get_num_threads(),
    }  # fmt: skip


@functools.cache
def _commit() -> str | None:
    """Of the code, with a + where it was changed since; None without git."""
    here = Path(__file__).parent
    try:
        commit, changed = (
            subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True).stdout.strip()
            for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + "+" * bool(changed)
