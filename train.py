"""Trains a GPT, and validates, evaluates and samples it along the way. Settings: train_config.py.

    python train.py demo                                             # one process, CPU or one GPU
    torchrun --standalone --nproc_per_node=8 train.py                # GPT-2 124M on 8 GPUs
    python train.py gpt2 --general.init-from resume                  # first start, restart and requeue alike
    python train.py gpt2 --general.mode val eval                     # the latest checkpoint, nothing trained

A run writes out/<run>/: config.json, log.csv, samples.txt, plot.png and checkpoints/.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import cast

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_, get_total_norm
from tqdm import tqdm

from babygpt import files
from babygpt.console import spoken
from babygpt.data.shards import Dataset
from babygpt.data.tokenizer import Tokenizer, load_tokenizer
from babygpt.errors import ConfigError, UserError
from babygpt.errors import run as run_script
from babygpt.evaluation.packing import Example
from babygpt.evaluation.validation import mean_loss
from babygpt.training import checkpoint
from babygpt.training.device import Mark, autocast, is_out_of_memory, untested_torch_warning, uses_bfloat16
from babygpt.training.distributed import Ranks, process_group
from babygpt.training.guard import Gate, check_numbers, check_replicas, checksum
from babygpt.training.metrics import Log, NullLog, NullSamples, Pending, Row, Samples, console_line
from babygpt.training.optim import Optimizers, load_optimizer_state, make_optimizers, optimizer_state, set_rates
from babygpt.training.plots import plot
from babygpt.training.run_dir import FINISHED, STOPPED, check_identity, latest_checkpoint, lock_run_dir, record_launch
from babygpt.training.seeds import derive_seed
from babygpt.training.signals import Stopped, StopSignals
from dataloader import DataLoader, Order, Position, Step, inputs_and_targets, validation_batches
from hellaswag import check_length, evaluate, fetch_examples
from model import GPT, config_of
from sample import sample
from train_config import (
    Config,
    changed_settings,
    due_tasks,
    micro_batch_warning,
    parse,
    read_config,
    resolve,
    settings_text,
    to_json,
    variant,
    ways_to_less_memory,
    with_micro_batch_size,
)  # fmt: skip

# ---------------------------------------------------------------------------------------------------------
# the training step


def train_step(
    model: nn.Module, optimizers: Optimizers, data: Step, config: Config, ranks: Ranks, seed: int,
    gate: Gate, stop: bool, compare: bool = False,
) -> torch.Tensor:  # fmt: skip
    """One update from all micro-batches of a step, unless the gate holds it back. Returns the status, (5 + 2 W,)
    float32 on the device: mean loss, gradient norm, z-score of the loss, whether it was held back, how many ranks were
    told to stop; for each rank whether loss or gradient aren't finite, and where `compare` a checksum of its weights.
    """
    torch.manual_seed(seed)  # of dropout: follows from the step, so no random state need be saved
    model.train()
    loss_sum = torch.zeros((), device=ranks.device)
    for i, batch in enumerate(data.micro_batches):
        idx, targets = inputs_and_targets(batch, ranks.device)
        if isinstance(model, DistributedDataParallel):  # read in the forward pass: all-reduce in the last backward
            model.require_backward_grad_sync = i == len(data.micro_batches) - 1
        with autocast(ranks.device, config.training.dtype):
            loss = model(idx, targets)
        # the sum over the step's targets, as a mean; times W because the ranks' gradients will be averaged
        (loss * (ranks.world_size / data.targets)).backward()
        loss_sum += loss.detach()

    parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    if config.optimizer.grad_clip > 0:
        norm = clip_grad_norm_(parameters, config.optimizer.grad_clip)
    else:
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    status = torch.zeros(5 + 2 * ranks.world_size, device=ranks.device)
    status[0] = loss_sum / data.targets
    status[4].fill_(float(stop))  # an assignment would copy it from the host, which waits on CUDA
    status[5 + ranks.rank] = ~loss_sum.isfinite()
    if ranks.bad_gradient is not None:
        status[5 + ranks.rank] += ranks.bad_gradient
        ranks.bad_gradient.zero_()
    if compare:
        status[5 + ranks.world_size + ranks.rank] = checksum(parameters)
    ranks.all_reduce(status)
    held, z = gate.judge(status[0], norm)
    status[1], status[2], status[3] = norm, z, held

    for optimizer in optimizers:
        optimizer.found_inf = held  # type: ignore[attr-defined]  # what PyTorch's fused kernels read
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return status


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


def identity(config: Config, dataset: Dataset, order: Order, tokenizer: Tokenizer) -> dict[str, dict]:
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


def restore_or_initialize(config: Config, dataset: Dataset, order: Order, tokenizer: Tokenizer, ranks: Ranks) -> Start:
    """The weights and the place to begin at, as --general.init-from says; writes config.json."""
    out, init_from = config.general.out_dir, config.general.init_from
    found = None
    if init_from == "resume":
        found = latest_checkpoint(out, ranks)
        # what the run began from is what it begins from again, if it was killed before its first checkpoint
        init_from = read_config(out / "config.json").get("general", {}).get("init_from", "scratch")
    elif (out / "config.json").exists() or checkpoint.checkpoints(out):
        raise ConfigError(
            f"{out} holds a run already. Go on with it: --general.init-from resume, or begin another beside it: "
            "--general.out-dir out/NAME."
        )
    torch.manual_seed(config.general.seed)
    if found:
        try:
            start = restore(found, config, identity(config, dataset, order, tokenizer), ranks)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"{found} lacks what a run goes on with ({error!r:.200}).") from None
    elif init_from == "scratch":
        start = Start(GPT(config.model), None, 0, 0, Position())
    else:
        ranks.print(f"beginning with the weights of {init_from}")
        model = ranks.main_first(lambda: GPT.from_pretrained(init_from))
        if model.tokenizer.sha256 != tokenizer.sha256:
            raise ConfigError(f"the weights of {init_from} know another tokenizer than {dataset.folder}.")
        start = Start(model.with_config(config.model), None, 0, 0, Position())

    settings = to_json(variant(config, general={"init_from": init_from}))
    record_launch(start.launches, start.step, settings, ranks)
    ranks.wait()  # all have looked at the folder before rank 0 writes to it
    if ranks.is_main:
        (out / FINISHED).unlink(missing_ok=True)
        if found is None:  # else it stays the last checkpoint's until the next one
            files.write_json(out / "config.json", settings)
        if tokenizer.name != "gpt2":
            files.write(out / tokenizer.name, tokenizer.data)
    return start


def restore(found: Path, config: Config, now: dict[str, dict], ranks: Ranks) -> Start:
    """A checkpoint's weights, optimizer and place; ConfigError where model or data are not the run's."""
    loaded = checkpoint.load(found)
    # with what was added since it was written
    state = {"optimizer": {"name": "adamw"}, "losses": [], "launches": []} | loaded.state
    state["model"] = asdict(config_of(state))
    check_identity(found, state, now)
    if state["step"] > config.training.max_steps:
        raise ConfigError(
            f"{found} is beyond --training.max-steps {config.training.max_steps:,} already. Give more steps, or "
            "another --general.out-dir."
        )
    ranks.print(f"resuming {found}")
    for line in changed_settings(found.parent.parent / "config.json", config):
        ranks.print(line)
    model = GPT(config.model)
    checkpoint.load_model_tensors(model, loaded.model)
    return Start(
        model, loaded.optimizer, state["step"], state["tokens"], Position(**state["position"]),
        [float(loss) for loss in state["losses"]], [{**launch} for launch in state["launches"]],
    )  # fmt: skip


def validate(
    model: nn.Module, dataset: Dataset, tokenizer: Tokenizer, config: Config, ranks: Ranks,
    stop: Callable[[], bool] = lambda: False,
) -> tuple[float, float]:  # fmt: skip
    """Mean loss over the validation tokens, in nats a token, and the same in bits a byte of their text.

    Where `stop()` on any rank, all raise Stopped.
    """
    block_size = cast(GPT, model).config.block_size  # a compiled model has it too
    if (count := len(dataset.val)) <= block_size:
        missing = f"not one row of block_size {block_size:,}. Prepare it with more --val-tokens."
        raise ConfigError(f"{dataset.folder} has {count:,} validation tokens, {missing}")
    rows = (block_size, config.training.micro_batch_size, ranks.rank, ranks.world_size, ranks.device.type == "cuda")
    token_bytes = torch.from_numpy(tokenizer.token_bytes())
    return mean_loss(model, validation_batches(dataset.val, *rows), token_bytes, ranks, config.training.dtype, stop)


def write_samples(
    model: GPT, tokenizer: Tokenizer, config: Config, step: int, ranks: Ranks, stop: Callable[[], bool] = lambda: False
) -> list[str]:
    """Texts by the settings of sampling. Where `stop()` on any rank, all raise Stopped."""
    s = config.sampling
    texts = sample(
        model, tokenizer, [s.prompt] * s.num_samples, s.max_new_tokens, s.temperature, s.top_k, s.top_p,
        derive_seed(config.general.seed, step), config.training.dtype, stop=stop,
    )  # fmt: skip
    if ranks.sum([stop()])[0]:
        raise Stopped
    return [s.prompt + text for text in texts]


# ---------------------------------------------------------------------------------------------------------
# training


SPIKE = 6.0  # standard deviations above the losses before, from which on a loss is told of
SCORES = {"val_loss", "hellaswag"}  # columns that a picture is drawn for


@dataclass
class Run:
    """What the periodic tasks share. `raw_model` is saved, evaluated and sampled. `fast_model` has the same weights and
    is compiled, for validation. `model` is `fast_model` wrapped for training on several ranks."""

    config: Config
    dataset: Dataset
    ranks: Ranks
    tokenizer: Tokenizer
    order: Order
    start: Start
    raw_model: GPT
    fast_model: nn.Module
    model: nn.Module
    optimizers: Optimizers
    examples: list[Example]
    log: Log
    samples: Samples
    bar: tqdm

    def say(self, line: str) -> None:
        if self.ranks.is_main:
            with spoken():
                tqdm.write(line)
                sys.stdout.flush()  # into a file too, line by line

    def plot(self) -> None:
        if self.ranks.is_main:
            out = self.config.general.out_dir
            plot([out], out / "plot.png")


def set_up(config: Config, dataset: Dataset, ranks: Ranks) -> Run:
    """Everything from the settings to the first step: order, examples, weights, optimizer, log."""
    device, out = ranks.device, config.general.out_dir
    tokenizer = load_tokenizer(dataset.tokenizer)
    if dataset.tokenizer_sha256 not in (None, tokenizer.sha256):
        raise ConfigError(f"{dataset.tokenizer} is not the tokenizer that {dataset.folder} was made with.")
    order = Order(
        dataset.train, dataset.eot_id, config.model.block_size, config.data.num_streams, config.general.seed,
        config.data.chunk_tokens,
    )  # fmt: skip
    rows_per_step = config.training.batch_tokens // config.model.block_size
    order.check(rows_per_step)
    e, examples = config.evaluation, list[Example]()
    if "eval" in config.general.mode and e.every_n_steps > 0:
        examples = fetch_examples(e.file, e.language, tokenizer, e.style, e.limit, ranks)
        check_length(examples, config.model.block_size)

    start = restore_or_initialize(config, dataset, order, tokenizer, ranks)
    raw_model = start.model.to(device)
    raw_model.recompute = config.training.activation_checkpointing
    raw_model.bf16_activations = config.training.bf16_activations
    optimizers = make_optimizers(raw_model, asdict(config.optimizer))
    if start.optimizer:
        load_optimizer_state(optimizers, raw_model, start.optimizer)
    compiled = config.training.compile == "on" or (config.training.compile == "auto" and device.type == "cuda")
    fast_model: nn.Module = torch.compile(raw_model, dynamic=False) if compiled else raw_model  # type: ignore
    model = ranks.data_parallel(fast_model, config.training.bf16_gradients)

    ranks.print(settings_text(config))
    micro_batches = rows_per_step // (config.training.micro_batch_size * ranks.world_size)
    kernel = raw_model.attention_backend(compiled, uses_bfloat16(device, config.training.dtype))
    where = f"{ranks.world_size} x {device.type}, {micro_batches} micro-batches per rank and step, {kernel} attention"
    ranks.print(f"{raw_model.num_params():,} parameters on {where}")
    ranks.print(order.summary(config.training.batch_tokens, config.training.max_steps))
    for warning in (untested_torch_warning(), micro_batch_warning(config, ranks.world_size)):
        if warning:
            ranks.print(warning)
    if dataset.manifest is None:
        ranks.print(f"warning: {dataset.folder} has no dataset.json: its tokens are taken for GPT-2's, unverified")
    log = Log(out / "log.csv", start.step) if ranks.is_main else NullLog()
    samples = Samples(out / "samples.txt", start.step) if ranks.is_main else NullSamples()
    silent = None if ranks.is_main else True  # None: only if stderr is a terminal
    bar = tqdm(total=config.training.max_steps, initial=start.step, unit="step", disable=silent)
    models = (raw_model, fast_model, model, optimizers)
    return Run(config, dataset, ranks, tokenizer, order, start, *models, examples, log, samples, bar)


def finish(run: Run, pending: Pending) -> bool:
    """Reads the status of a step, writes its row of the log, and tells whether a rank was told to stop."""
    pending.end.wait()
    loss, norm, z, held, stops, *of_ranks = pending.status.tolist()
    not_finite, sums = of_ranks[: run.ranks.world_size], of_ranks[run.ranks.world_size :]
    row, step = pending.row, pending.row["step"]
    check_numbers(step, loss, norm, not_finite)
    check_replicas(step, sums, run.config.training.compare_ranks_every_n_steps)
    if z > SPIKE or held:
        run.say(
            f"step {step:>6} | the loss, {loss:.4f}, is {z:.1f} standard deviations above those before"
            + (": its update is left out" if held else "")
        )
    row["loss"], row["grad_norm"] = loss, norm
    bfloat16 = uses_bfloat16(run.ranks.device, run.config.training.dtype)
    row |= pending.speed(
        run.config.training.batch_tokens, run.raw_model.flops_per_token() if bfloat16 else None, run.ranks
    )
    run.log.write(row)
    with spoken():
        run.bar.update()
    if SCORES & row.keys():
        run.plot()
    every = run.config.logging.every_n_steps
    if every and step % every == 0:
        run.say(console_line(row))
    if step == run.start.step + 10:
        hours = row["step_ms"] / 3.6e6 * (run.config.training.max_steps - step)
        run.say(f"about {hours:.1f} hours of training to go, without evaluations")
    return stops > 0


def train(run: Run, signals: StopSignals, saver: checkpoint.Saver, until: int | None = None) -> None:
    """The loop: before update k the scenes that are due look at the weights after k updates. At step `until` it stops
    as if it was told to."""
    config, ranks, raw_model = run.config, run.ranks, run.raw_model
    out, max_steps, o = config.general.out_dir, config.training.max_steps, config.optimizer
    tokens, position, compared = run.start.tokens, run.start.position, config.training.compare_ranks_every_n_steps
    loader = DataLoader(
        run.order, position, config.training.batch_tokens // config.model.block_size,
        config.training.micro_batch_size, ranks.rank, ranks.world_size, ranks.device,
    )  # fmt: skip
    gate = Gate(ranks.device, config.training.skip_spikes, run.start.losses)
    pending: Pending | None = None  # the step before, whose status the host has not read
    begin_mark: Mark | None = None  # where the time of the next step begins; None behind other work
    stopping = False

    for step in range(run.start.step, max_steps + 1):
        last, ranks.doing = step == max_steps, f"what comes before step {step}"
        row: Row = {"step": step, "tokens": tokens, "epoch": position.epoch}
        due = due_tasks(config, step, run.start.step)
        if pending and (due or last or stopping):
            signals.nothing_to_lose = False
            stopping |= finish(run, pending)
            pending, begin_mark = None, None
        stopping |= step == until and not last
        if stopping:
            due = {"saving"}

        try:
            # --- validate
            if "validation" in due:
                row["val_loss"], row["val_bpb"] = validate(
                    run.fast_model, run.dataset, run.tokenizer, config, ranks, signals.told
                )
                run.say(f"step {step:>6} | validation loss {row['val_loss']:.4f} | {row['val_bpb']:.4f} bits a byte")

            # --- evaluate
            if "evaluation" in due:
                style, dtype = config.evaluation.style, config.training.dtype
                scores = evaluate(raw_model, run.examples, style, ranks, dtype, stop=signals.told)
                run.say(f"step {step:>6} | " + " | ".join(map(str, scores.values())))
                if style == "karpathy":
                    row["hellaswag"] = scores["acc_norm"].value

            # --- sample
            if "sampling" in due:
                texts = write_samples(raw_model, run.tokenizer, config, step, ranks, signals.told)
                run.samples.write(step, texts)
                run.say(f"step {step:>6} | {texts[0]}")
        except Stopped:  # the scenes wait for the resume
            stopping, due = True, {"saving"}

        # --- save
        if "saving" in due and ranks.is_main:
            run.log.sync()
            state = {
                "step": step, "tokens": tokens, "position": asdict(position), "losses": gate.losses(),
                "launches": run.start.launches,
            }  # fmt: skip
            saver.save(
                step, checkpoint.model_tensors(raw_model), optimizer_state(run.optimizers, raw_model),
                state | identity(config, run.dataset, run.order, run.tokenizer),
            )  # fmt: skip
        if last or stopping:
            ranks.main_first(saver.wait)  # where it could not save, all end so
            break

        # --- step
        ranks.doing = f"step {step}"
        data = next(loader)
        if data.start.epoch > position.epoch:
            unread = len(run.dataset.train) - position.n * run.order.block_size
            run.say(f"epoch {data.start.epoch} begins; {unread:,} tokens of the one before stay unread")
        row["epoch"] = data.start.epoch
        row["lr"] = set_rates(
            run.optimizers, step, o.min_lr_ratio, o.warmup_steps, max_steps, o.cooldown, o.momentum_warmup_steps
        )
        begin_mark = begin_mark or Mark(ranks.device)
        status = train_step(
            run.model, run.optimizers, data, config, ranks, derive_seed(config.general.seed, step, ranks.rank), gate,
            stop=signals.told() or saver.error is not None, compare=compared > 0 and step % compared == 0,
        )  # fmt: skip
        status = status.to("cpu", non_blocking=ranks.device.type == "cuda")
        end_mark = Mark(ranks.device)  # behind the copy: who has waited for it can read the status
        begun, begin_mark = Pending(row, status, begin_mark, end_mark), end_mark
        if pending:  # read a step late, while the device is busy with this one
            signals.nothing_to_lose = False
            stopping |= finish(run, pending)
            if SCORES & pending.row.keys():
                begin_mark = None  # a picture was drawn
        pending, tokens, position = begun, tokens + config.training.batch_tokens, data.end

    loader.close()
    if ranks.is_main:
        if not stopping:
            run.log.write(row)
        (out / (STOPPED if stopping else FINISHED)).touch()
        run.log.close()
        with spoken():
            run.bar.close()
    run.plot()
    if stopping:
        run.say(f"stopped at step {step}, saved. Go on with the same command and --general.init-from resume.")


def assess(config: Config, dataset: Dataset | None, ranks: Ranks) -> None:
    """Validates, evaluates and samples a checkpoint (or GPT-2's own weights); the run's log stays as it is."""
    init_from = config.general.init_from
    spec = config.general.out_dir if init_from in ("scratch", "resume") else init_from
    model = ranks.main_first(lambda: GPT.from_pretrained(spec, ranks.device))
    model.bf16_activations, tokenizer = config.training.bf16_activations, model.tokenizer
    ranks.print(f"{model.source}: {model.num_params():,} parameters")
    if dataset is not None:  # "val" is in the mode
        if dataset.tokenizer_sha256 not in (None, tokenizer.sha256):
            raise ConfigError(f"{dataset.folder} was made with another tokenizer than the model of {spec}.")
        loss, bpb = validate(model, dataset, tokenizer, config, ranks)
        ranks.print(f"validation loss {loss:.4f} | {bpb:.4f} bits a byte")
    if "eval" in config.general.mode:
        e = config.evaluation
        examples = fetch_examples(e.file, e.language, tokenizer, e.style, e.limit, ranks)
        scores = evaluate(model, examples, e.style, ranks, config.training.dtype)
        ranks.print(*scores.values(), sep="\n")
    if "sample" in config.general.mode:
        for text in write_samples(model, tokenizer, config, model.step or 0, ranks):
            ranks.print(f"---\n{text}")


def main() -> None:
    _, config = parse(sys.argv[1:])
    config, dataset = resolve(config, int(os.environ.get("WORLD_SIZE", "1")))
    out, general, saving = config.general.out_dir, config.general, config.saving
    group = process_group(general.device, general.timeout_minutes, general.deterministic)
    if "train" not in general.mode:
        with group as ranks:
            return assess(with_micro_batch_size(config, ranks.memory_for(config.training.dtype), 1), dataset, ranks)
    assert dataset is not None, "resolve() opens the data set if the mode includes train"
    with StopSignals() as signals, group as ranks:
        config = with_micro_batch_size(config, ranks.memory_for(config.training.dtype), ranks.world_size)
        try:
            with lock_run_dir(out, ranks), checkpoint.Saver(out, saving.keep, saving.keep_every) as saver:
                signals.marker = out / STOPPED
                train(set_up(config, dataset, ranks), signals, saver)  # no name holds the model when the ranks part
        except OSError as error:  # of the log, the samples, the picture; a checkpoint's is told by itself
            raise UserError(f"{error} in {ranks.doing}. What was saved is whole: mend it and resume.") from None
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            what, ways = (str(error).splitlines() or [""])[0], ways_to_less_memory(config, ranks.world_size)
            raise UserError(f"out of memory in {ranks.doing} ({what:.100}). {ways}") from None


if __name__ == "__main__":
    run_script(main)
