"""How a run begins: from scratch, from its own last checkpoint, or from other weights; and what is refused.

python train.py gpt2                                 # scratch; refused where a run is already
python train.py gpt2 --general.init-from resume      # the last checkpoint, or scratch where there is none
python train.py gpt2 --general.init-from gpt2        # OpenAI's weights, a Hugging Face folder, another run
"""

import functools
import platform
import shutil
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

import checkpoint
from dataloader import Order, Position
from distributed import Ranks, uses_bfloat16
from errors import ConfigError
from model import GPT
from shards import Dataset, write_json
from tokenizer import Tokenizer, load_tokenizer
from train_config import Config, differences, read_config, to_json, variant

# empty files in a run's folder, for scripts: it has done all its steps, or was told to stop and has saved
FINISHED, STOPPED = "finished", "stopped"


@dataclass
class Start:
    """What the loop begins with. `position` is the place in the data, `tokens` were trained on before, `losses` are the
    last ones."""

    model: GPT
    optimizer: dict | None  # tensors to put into it, of a resumed run
    step: int
    tokens: int
    position: Position
    losses: list[float] = field(default_factory=list)


def begin(config: Config, dataset: Dataset, order: Order, tokenizer: Tokenizer, ranks: Ranks) -> Start:
    """The weights and the place to begin at, as --general.init-from says; writes config.json."""
    out, init_from = Path(config.general.out_dir), config.general.init_from
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--general.out-dir {out} is a file.")
    found = None
    if init_from == "resume":
        found = checkpoint.latest(out)
        if found is None and checkpoint.checkpoints(out):
            raise ConfigError(f"none of the {len(checkpoint.checkpoints(out))} checkpoints of {out} is sound.")
        # what the run began from is what it begins from again, if it was killed before its first checkpoint
        init_from = read_config(out / "config.json").get("general", {}).get("init_from", "scratch")
    elif (out / "config.json").exists() or checkpoint.checkpoints(out):
        raise ConfigError(
            f"{out} holds a run already. Go on with it: --general.init-from resume, or begin another beside it: "
            "--general.out-dir out/NAME."
        )
    if len(places := set(ranks.gather(checkpoint.step_of(found) if found else -1))) > 1:
        raise ConfigError(f"the ranks see different checkpoints in {out} (steps {sorted(map(int, places))}): share it.")
    torch.manual_seed(config.general.seed)
    if found:
        try:
            start = _resumed(found, config, identity(config, dataset, order, tokenizer), ranks)
        except (KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{found} lacks what a run goes on with ({error!r:.200}).") from None
    elif init_from == "scratch":
        start = Start(GPT(config.model), None, 0, 0, Position())
    else:
        ranks.print(f"beginning with the weights of {init_from}")
        loaded = ranks.main_first(lambda: checkpoint.load_model(init_from, torch.device("cpu")))
        if load_tokenizer(loaded.tokenizer).sha256 != tokenizer.sha256:
            raise ConfigError(f"the weights of {init_from} know another tokenizer than {dataset.folder}.")
        start = Start(_fitted(loaded.model, config, init_from), None, 0, 0, Position())

    ranks.wait()  # all have looked at the folder before rank 0 writes to it
    if ranks.is_main:
        out.mkdir(parents=True, exist_ok=True)
        for marker in (FINISHED, STOPPED):
            (out / marker).unlink(missing_ok=True)
        write_json(out / "config.json", to_json(variant(config, general={"init_from": init_from})))
        if tokenizer.name != "gpt2":
            shutil.copyfile(tokenizer.file, out / tokenizer.name)
    return start


def _resumed(found: Path, config: Config, now: dict, ranks: Ranks) -> Start:
    """A checkpoint's weights, optimizer and place; ConfigError where model or data are not the run's."""
    loaded = checkpoint.load(found)
    state = {"optimizer": {"name": "adamw"}, "losses": []} | loaded.state  # with what was added since it was written
    state["model"] = asdict(checkpoint.model_config(state))
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
        model, loaded.optimizer, state["step"], state["tokens"], Position(**state["position"]), state["losses"]
    )


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
