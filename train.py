"""Train a GPT, with periodic validation, HellaSwag evaluation and samples. The settings are in train_config.py.

    python train.py demo                                             # one process, on a CPU or one GPU
    torchrun --standalone --nproc_per_node=8 train.py                # GPT-2 124M on 8 GPUs
    python train.py gpt2 --general.init-from resume                  # resume, or start if there is no checkpoint
    python train.py gpt2 --general.mode val eval                     # evaluate the latest checkpoint, without training

A run writes out/<run>/: config.json, log.csv, samples.txt, plot.png, report.html and checkpoints/.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import cast

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_, get_total_norm

from arguments import bind, parse, resolve, to_json, with_micro_batch_size
from babygpt import files
from babygpt.console import console, counted
from babygpt.data.shards import Dataset, open_dataset
from babygpt.data.tokenizer import Tokenizer, load_tokenizer
from babygpt.errors import ConfigError
from babygpt.errors import run as run_script
from babygpt.evaluation import tasks
from babygpt.evaluation.packing import Example
from babygpt.evaluation.validation import mean_loss
from babygpt.nn.attention import training_backend
from babygpt.nn.generation import SamplingParams
from babygpt.pretrained import read_pretrained
from babygpt.settings import variant
from babygpt.training import checkpoint, compilation, optim, run_dir
from babygpt.training.checkpoint import Saver
from babygpt.training.device import autocast, untested_torch_warning, uses_bfloat16
from babygpt.training.distributed import Ranks, explain_failures, process_group
from babygpt.training.guard import StepStatus, UpdateGuard, checksum
from babygpt.training.log import Row
from babygpt.training.memory import memory_advice, micro_batch_warning
from babygpt.training.metrics import Metrics
from babygpt.training.monitor import StepMonitor
from babygpt.training.optim import Optimizers
from babygpt.training.schedule import Due, LRSchedule, Schedule
from babygpt.training.seeds import derive_seed
from babygpt.training.signals import StopRequested, StopSignals
from dataloader import Batch, DataLoader, Order, Position, inputs_and_targets, validation_batches
from hellaswag import evaluate, fetch_examples
from model import GPT, ModernConfig, build_model
from sample import sample
from train_config import PRESETS, Config, preset

# ---------------------------------------------------------------------------------------------------------
# the training step


LossFunction = Callable[[nn.Module, torch.Tensor, torch.device], torch.Tensor]


def next_token_loss(model: nn.Module, rows: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return the loss summed over all targets, () float32, of rows (B, T + 1) int64 on the host."""
    idx, targets = inputs_and_targets(rows, device)  # copied to the device without waiting
    return model(idx, targets, reduction="sum")


@dataclass
class TrainState:
    """What `train_step` reads and updates."""

    model: nn.Module  # compiled if requested, in DDP if there are several ranks
    optimizers: Optimizers
    guard: UpdateGuard
    ranks: Ranks
    dtype: str = "auto"  # of matrix products, under autocast
    grad_clip: float = 0.0  # 0: no clipping


def train_step(
    state: TrainState, batch: Batch, loss_function: LossFunction, seed: int, stop: bool = False, compare: bool = False
) -> torch.Tensor:
    """Accumulate gradients over the micro-batches and make one update, unless the guard skips it.

    The loss is that of all micro-batches and ranks, divided by `batch.num_targets`. Returns the packed StepStatus on
    the device, without waiting for it. It also carries `stop`, so that all ranks stop together, and, with `compare`,
    checksums of the weights before the update, to detect ranks that differ.
    """
    model, ranks = state.model, state.ranks
    torch.manual_seed(seed)  # dropout depends on step and rank alone, so checkpoints need no RNG state
    model.train()
    loss_sum = torch.zeros((), device=ranks.device)
    for i, rows in enumerate(batch.micro_batches):
        if isinstance(model, DistributedDataParallel):  # all-reduce in the last backward pass; DDP reads it in forward
            model.require_backward_grad_sync = i == len(batch.micro_batches) - 1
        with autocast(ranks.device, state.dtype):
            loss = loss_function(model, rows, ranks.device)
        (loss * (ranks.world_size / batch.num_targets)).backward()  # times world_size, since DDP averages over ranks
        loss_sum += loss.detach()

    parameters = optim.parameters_of(state.optimizers)
    if state.grad_clip > 0:
        norm = clip_grad_norm_(parameters, state.grad_clip)
    else:
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    nonfinite = ~loss_sum.isfinite() | ranks.pop_nonfinite_flag()  # on this rank, for the message
    weights = checksum(parameters) if compare else None
    local = StepStatus.of_rank(ranks.rank, ranks.world_size, loss_sum / batch.num_targets, nonfinite, stop, weights)
    status = StepStatus.unpack(ranks.all_reduce(local.pack()))  # sums over ranks, with a slot per rank for the flags
    status.grad_norm = norm  # before clipping, and equal on all ranks
    status.skip_update, status.z_score = state.guard.judge(status.loss, norm)

    for optimizer in state.optimizers:  # if found_inf is 1, a step changes neither weights nor optimizer state
        optimizer.found_inf = status.skip_update  # type: ignore[attr-defined]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return status.pack()


# ---------------------------------------------------------------------------------------------------------
# setup


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


@dataclass
class Run:
    """Everything that the training loop needs."""

    config: Config
    dataset: Dataset
    tokenizer: Tokenizer
    order: Order
    start: InitialState
    ranks: Ranks
    raw_model: GPT  # used for checkpoints, HellaSwag and samples
    fast_model: nn.Module  # raw_model, compiled if requested: used for validation, and wrapped by state.model
    state: TrainState
    examples: list[Example]  # HellaSwag
    task_examples: dict[tasks.TaskName, list[Example]]
    metrics: Metrics
    identity: dict[str, dict]  # settings that must not change on resume


def set_up(config: Config, dataset: Dataset, ranks: Ranks) -> Run:
    """Build the data order, the model, the optimizers and the log, and print a description of the run."""
    training, model_config = config.training, config.model
    tokenizer = load_tokenizer(dataset.tokenizer)
    dataset.check_tokenizer(tokenizer, dataset.tokenizer)
    order = Order(
        dataset.train, dataset.eot_id, model_config.block_size, config.data.num_streams, config.general.seed,
        config.data.chunk_tokens,
    )  # fmt: skip
    order.check(training.batch_tokens // model_config.block_size)
    examples, task_examples = list[Example](), dict[tasks.TaskName, list[Example]]()
    if "eval" in config.general.mode and config.evaluation.every_n_steps > 0:
        examples, task_examples = load_evaluation(config, tokenizer, ranks)
    if "sample" in config.general.mode:
        tokenizer.encode(config.sampling.prompt)  # an error now rather than at the first samples

    identity = run_dir.identity_of(config, dataset, order, tokenizer)
    start = restore_or_initialize(config, dataset, identity, ranks)
    raw_model = start.model.to(ranks.device)
    raw_model.activation_checkpointing = training.activation_checkpointing  # may change on resume
    raw_model.bf16_activations = training.bf16_activations
    compile_setting = compilation.resolve(config, raw_model, ranks, start.launches, start.step)  # may take a minute
    config = variant(config, training={"compile": compile_setting})
    record_start(config, start, tokenizer, ranks)
    optimizers = optim.make_optimizers(raw_model, asdict(config.optimizer))
    if start.optimizer_state:
        optim.load_optimizer_state(optimizers, raw_model, start.optimizer_state)
        start.optimizer_state = None  # copied: free the memory
    compiled = compile_setting == "on"
    fast_model = cast(nn.Module, torch.compile(raw_model, dynamic=False)) if compiled else raw_model
    guard = UpdateGuard(ranks.device, training.skip_spikes, start.losses)
    state = TrainState(
        ranks.data_parallel(fast_model, training.bf16_gradients), optimizers, guard, ranks, training.dtype,
        config.optimizer.grad_clip,
    )  # fmt: skip
    flops = raw_model.flops_per_token() if uses_bfloat16(ranks.device, training.dtype) else None
    metrics = Metrics(
        config.general.out_dir, ranks, start.step, training.max_steps, training.batch_tokens, flops,
        training.compare_ranks_every_n_steps, config.logging.every_n_steps, config.logging.tracker, to_json(config),
    )  # fmt: skip
    describe(config, raw_model, order, ranks, compiled)
    if dataset.manifest is None:
        console.warning(
            f"{dataset.directory} has no dataset.json. Its tokens cannot be verified and are assumed to be GPT-2's."
        )
    return Run(
        config, dataset, tokenizer, order, start, ranks, raw_model, fast_model, state, examples, task_examples, metrics,
        identity,
    )  # fmt: skip


def load_evaluation(
    config: Config, tokenizer: Tokenizer, ranks: Ranks
) -> tuple[list[Example], dict[tasks.TaskName, list[Example]]]:
    """Return the examples of HellaSwag and of --evaluation.tasks."""
    settings = config.evaluation
    examples = fetch_examples(settings.file, settings.language, tokenizer, settings.style, settings.limit, ranks)
    return examples, tasks.load_tasks(settings.tasks, tokenizer, settings.limit, ranks)


def describe(config: Config, model: GPT, order: Order, ranks: Ranks, compiled: bool) -> None:
    """Print the settings, the model, the data order, and warnings."""
    training = config.training
    family = "modern" if isinstance(config.model, ModernConfig) else "gpt2"
    settings = run_dir.format_settings(to_json(config), to_json(preset(family)))
    console.info(f"Settings that differ from the preset {family} (config.json lists all settings):\n{settings}")
    micro_batches = training.batch_tokens // (order.block_size * training.micro_batch_size * ranks.world_size)
    bfloat16 = uses_bfloat16(ranks.device, training.dtype)
    kernel = training_backend(config.model, config.model.mask_rule, ranks.device, bfloat16, compiled)
    console.info(
        f"{model.num_params():,} parameters on {ranks.world_size} x {ranks.device.type}, "
        f"{counted(micro_batches, 'micro-batch')} per rank and step, {kernel} attention"
    )
    if compiled:
        console.info("Compiling the model. The first step may take a minute or more")
    console.info(order.summary(training.batch_tokens, training.max_steps))
    batch = (training.batch_tokens, order.block_size, training.micro_batch_size, ranks.world_size)
    repetition = order.repetition_warning(training.batch_tokens, training.max_steps)
    for warning in filter(None, (untested_torch_warning(), micro_batch_warning(*batch), repetition)):
        console.warning(warning)


def restore_or_initialize(config: Config, dataset: Dataset, identity: dict[str, dict], ranks: Ranks) -> InitialState:
    """Return the state in which training starts, from --general.init-from."""
    out, init_from, path = config.general.out_dir, config.general.init_from, None
    if init_from == "resume":
        path = run_dir.latest_checkpoint(out, ranks)
        # without a checkpoint, start from the initial weights of the run or, in a new directory, of the preset
        new = PRESETS.get(config.general.preset, {}).get("general", {}).get("init_from", "scratch")
        init_from = run_dir.read_config(out / "config.json").get("general", {}).get("init_from", new)
    elif (out / run_dir.FINISHED).exists() or checkpoint.list_checkpoints(out):
        raise ConfigError(
            f"{out} already contains a run. Resume it with --general.init-from resume, or start another run with "
            "--general.out-dir out/NAME."
        )
    torch.manual_seed(config.general.seed)  # the same initial weights on all ranks
    if path:
        return restore(path, init_from, config, identity)
    if init_from == "scratch":
        return InitialState(build_model(config.model), init_from)
    console.info(f"Starting from the weights of {init_from}")
    weights = ranks.main_process_first(lambda: read_pretrained(init_from))
    dataset.check_tokenizer(weights.tokenizer, init_from)
    return InitialState(weights.adapt(asdict(config.model)).build(lambda _: build_model(config.model)), init_from)


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
            f"{path} is past --training.max-steps {config.training.max_steps:,}. Increase --training.max-steps, or use "
            "a different --general.out-dir."
        )
    console.info(f"Resuming from {path}")
    model = build_model(config.model)
    checkpoint.load_model_tensors(model, loaded.model)
    return InitialState(model, init_from, path, loaded.optimizer, step, tokens, position, losses, launches)


# ---------------------------------------------------------------------------------------------------------
# periodic tasks


def validate(
    model: nn.Module, dataset: Dataset, tokenizer: Tokenizer, config: Config, ranks: Ranks,
    stop: Callable[[], bool] = lambda: False,
) -> tuple[float, float]:  # fmt: skip
    """Return the mean loss over the validation tokens, in nats per token and in bits per byte.

    All ranks raise StopRequested if `stop()` is true on any of them.
    """
    block_size = cast(GPT, model).config.block_size  # a compiled model has the attribute too
    rows = (block_size, config.training.micro_batch_size, ranks.rank, ranks.world_size, ranks.device.type == "cuda")
    token_bytes = torch.from_numpy(tokenizer.token_bytes())
    return mean_loss(model, validation_batches(dataset.val, *rows), token_bytes, ranks, config.training.dtype, stop)


def generate_samples(
    model: GPT, tokenizer: Tokenizer, config: Config, step: int, ranks: Ranks, stop: Callable[[], bool] = lambda: False
) -> list[str]:
    """Return completions of the prompt. All ranks raise StopRequested if `stop()` is true on any of them."""
    sampling = config.sampling
    seed = derive_seed(config.general.seed, step)
    params = SamplingParams(sampling.max_new_tokens, sampling.temperature, sampling.top_k, sampling.top_p, seed)
    with autocast(ranks.device, config.training.dtype):
        texts = sample(model, tokenizer, [sampling.prompt] * sampling.num_samples, params, stop=stop)
    if ranks.sum([stop()])[0]:
        raise StopRequested
    return [sampling.prompt + text for text in texts]


def run_tasks(run: Run, due: Due, step: int, stop: Callable[[], bool]) -> Row:
    """Run the tasks that are due, except for the checkpoint, and return their scores for the log."""
    config, ranks, row = run.config, run.ranks, Row()
    if due.validation:
        loss, bits_per_byte = validate(run.fast_model, run.dataset, run.tokenizer, config, ranks, stop)
        row |= {"val_loss": loss, "val_bpb": bits_per_byte}
        console.info(f"step {step:>6} | validation loss {loss:.4f} | {bits_per_byte:.4f} bits per byte")
    if due.evaluation and run.examples:
        style = config.evaluation.style
        scores = evaluate(run.raw_model, run.examples, style, ranks, config.training.dtype, stop=stop)
        console.info(f"step {step:>6} | " + " | ".join(map(str, scores.values())))
        if style == "karpathy":  # the only scoring method that log.csv records
            row["hellaswag"] = scores["acc_norm"].value
    if due.evaluation and run.task_examples:
        found = tasks.evaluate_all(run.raw_model, run.task_examples, ranks, config.training.dtype, stop)
        run.metrics.write_scores(step, found)
    if due.samples:
        texts = generate_samples(run.raw_model, run.tokenizer, config, step, ranks, stop)
        if run.metrics.samples is not None:
            run.metrics.samples.write(step, texts)
        console.info(f"step {step:>6} | {texts[0]}")
    return row


def save(run: Run, saver: Saver, step: int, tokens: int, position: Position) -> None:
    """On the main rank, copy the state to the host and write a checkpoint in the background."""
    if run.metrics.log is None:
        return
    run.metrics.log.sync()  # a resume needs all rows before this step
    progress = {
        "step": step, "tokens": tokens, "position": asdict(position), "losses": run.state.guard.losses(),
        "launches": run.start.launches,
    }  # fmt: skip
    optimizer = optim.optimizer_state(run.state.optimizers, run.raw_model)
    saver.save(step, checkpoint.model_tensors(run.raw_model), optimizer, progress | run.identity)


# ---------------------------------------------------------------------------------------------------------
# the loop


def train(run: Run, signals: StopSignals, saver: Saver, until: int | None = None) -> None:
    """Train to the last step. At step `until`, stop as if a stop signal had arrived (tools/replay.py uses this)."""
    config, ranks, metrics, start = run.config, run.ranks, run.metrics, run.start
    training, max_steps = config.training, config.training.max_steps
    tokens, position = start.tokens, start.position
    schedule, lr_schedule = make_schedules(config, start.step)
    monitor = StepMonitor(ranks.device, metrics.record)  # reads each status one step late, so the host never waits
    loader = DataLoader(
        run.order, position, training.batch_tokens // config.model.block_size, training.micro_batch_size, ranks.rank,
        ranks.world_size, ranks.device,
    )  # fmt: skip
    for step in range(start.step, max_steps + 1):  # the last iteration only runs the tasks
        last_step = step == max_steps
        ranks.phase = f"the tasks before step {step}"
        signals.nothing_to_save = step == start.step  # until the first update, a signal exits immediately
        due = schedule.due(step)
        if due or last_step or monitor.stop_requested or step == until:
            monitor.flush()  # logs all previous steps and updates `stop_requested`
        stopping = monitor.stop_requested or (step == until and not last_step)
        row: Row = {"step": step, "tokens": tokens, "epoch": position.epoch}
        try:
            if not stopping:
                row |= run_tasks(run, due, step, stop=lambda: signals.requested)
        except StopRequested:  # on all ranks; the resumed run repeats the tasks of this step
            stopping = True
        if due.checkpoint or stopping:
            save(run, saver, step, tokens, position)
        if last_step or stopping:
            break

        ranks.phase = f"step {step}"
        batch = next(loader)
        if batch.start.epoch > position.epoch:
            unread = len(run.dataset.train) - position.n * run.order.block_size
            console.info(f"Epoch {batch.start.epoch} starts; {unread:,} tokens of the previous epoch were not read")
        row["epoch"] = batch.start.epoch
        row["lr"] = optim.set_learning_rates(run.state.optimizers, lr_schedule, step)
        compare = training.compare_ranks_every_n_steps > 0 and step % training.compare_ranks_every_n_steps == 0
        stop = signals.requested or saver.error is not None  # if a save fails, all ranks stop
        monitor.start()
        seed = derive_seed(config.general.seed, step, ranks.rank)
        status = train_step(run.state, batch, next_token_loss, seed, stop=stop, compare=compare)
        monitor.push(row, status)
        tokens, position = tokens + training.batch_tokens, batch.end

    loader.close()
    ranks.main_process_first(saver.wait)  # if a save failed, all ranks raise an error
    if not stopping:  # otherwise the resumed run writes the complete row
        metrics.write(row)
    metrics.finish(step, stopping)


def make_schedules(config: Config, start: int) -> tuple[Schedule, LRSchedule]:
    """Build the schedules of the learning rates and of the periodic tasks that --general.mode includes."""
    modes, max_steps, optimizer = config.general.mode, config.training.max_steps, config.optimizer
    schedule = Schedule(
        validation=config.validation.every_n_steps if "val" in modes else 0,
        evaluation=config.evaluation.every_n_steps if "eval" in modes else 0,
        samples=config.sampling.every_n_steps if "sample" in modes else 0,
        checkpoint=config.saving.every_n_steps,
        max_steps=max_steps,
        start=start,
    )
    lr_schedule = LRSchedule(
        max_steps, optimizer.warmup_steps, optimizer.min_lr_ratio, optimizer.cooldown,
        momentum=optimizer.momentum or 0.0, momentum_warmup_steps=optimizer.momentum_warmup_steps,
    )  # fmt: skip
    return schedule, lr_schedule


# ---------------------------------------------------------------------------------------------------------
# the command


def evaluate_checkpoint(config: Config, dataset: Dataset | None, ranks: Ranks) -> None:
    """Run the tasks of --general.mode once, on the latest checkpoint or on the weights of --general.init-from."""
    init_from = config.general.init_from
    spec = config.general.out_dir if init_from in ("scratch", "resume") else init_from
    model = ranks.main_process_first(lambda: GPT.from_pretrained(spec, ranks.device))
    model.bf16_activations, tokenizer = config.training.bf16_activations, model.tokenizer
    config = with_micro_batch_size(replace(config, model=model.config), ranks.memory_for(config.training.dtype), 1)
    console.info(f"{model.source}: {model.num_params():,} parameters")
    if dataset is not None:  # the mode includes val
        dataset.check_tokenizer(tokenizer, str(spec))
        loss, bits_per_byte = validate(model, dataset, tokenizer, config, ranks)
        console.info(f"validation loss {loss:.4f} | {bits_per_byte:.4f} bits per byte")
    if "eval" in config.general.mode:
        examples, task_examples = load_evaluation(config, tokenizer, ranks)
        scores = evaluate(model, examples, config.evaluation.style, ranks, config.training.dtype)
        task_scores = tasks.evaluate_all(model, task_examples, ranks, config.training.dtype)
        for score in (*scores.values(), *task_scores):
            console.info(str(score))
    if "sample" in config.general.mode:
        for text in generate_samples(model, tokenizer, config, model.step or 0, ranks):
            console.info(f"---\n{text}")


def main() -> None:
    _, config = parse(sys.argv[1:])
    config = resolve(config, int(os.environ.get("WORLD_SIZE", "1")))
    general, saving, dataset = config.general, config.saving, None
    if {"train", "val"} & set(general.mode):
        dataset = open_dataset(config.data.dataset)
        config = bind(config, dataset)
    group = process_group(general.device, general.timeout_minutes, general.deterministic)
    if "train" not in general.mode:
        with group as ranks, explain_failures(ranks, memory_advice(0, 0, activation_checkpointing=True)):
            return evaluate_checkpoint(config, dataset, ranks)
    assert dataset is not None, "opened above, since the mode includes train"
    with StopSignals() as signals, group as ranks:
        config = with_micro_batch_size(config, ranks.memory_for(config.training.dtype), ranks.world_size)
        training, rows = config.training, config.training.batch_tokens // config.model.block_size // ranks.world_size
        advice = memory_advice(rows, training.micro_batch_size, training.activation_checkpointing)
        with (
            explain_failures(ranks, advice),
            run_dir.lock_run_dir(general.out_dir, ranks),
            Saver(general.out_dir, saving.keep, saving.keep_every) as saver,
        ):
            signals.marker = general.out_dir / run_dir.STOPPED
            train(set_up(config, dataset, ranks), signals, saver)  # the run is freed before the process group


if __name__ == "__main__":
    run_script(main)
