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
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol, cast

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_, get_total_norm

from arguments import bind, parse, resolve, to_json, with_micro_batch_size
from babygpt.console import console, counted
from babygpt.data.shards import Dataset, open_dataset
from babygpt.data.tokenizer import Tokenizer, load_tokenizer
from babygpt.errors import run as run_script
from babygpt.evaluation import tasks
from babygpt.evaluation.packing import Example
from babygpt.evaluation.validation import mean_loss
from babygpt.nn.attention import training_backend
from babygpt.nn.generation import SamplingParams
from babygpt.pretrained import Pretrained
from babygpt.settings import variant
from babygpt.training import checkpoint, compilation, optim, run_dir
from babygpt.training.checkpoint import Saver
from babygpt.training.device import autocast, untested_torch_warning, uses_bfloat16
from babygpt.training.distributed import Ranks, explain_failures, process_group
from babygpt.training.guard import StepStatus, UpdateGuard, checksum
from babygpt.training.log import Row
from babygpt.training.memory import memory_advice, micro_batch_warning
from babygpt.training.metrics import Metrics, format_validation
from babygpt.training.monitor import StepMonitor
from babygpt.training.optim import Optimizers
from babygpt.training.prefetch import Prefetcher
from babygpt.training.schedule import Due, LRSchedule, Schedule
from babygpt.training.seeds import derive_seed
from babygpt.training.signals import StopRequested, StopSignals
from dataloader import Batch, DataLoader, Order, Position, inputs_and_targets, validation_batches
from hellaswag import evaluate, fetch_examples
from launch import InitialState, record_start, restore_or_initialize
from model import GPT, ModernConfig
from sample import sample
from train_config import Config, Sampling, preset

Stop = Callable[[], bool]  # whether a stop signal has arrived

# ---------------------------------------------------------------------------------------------------------
# the training step


# (model, micro-batch on the host, device) -> (1 + k,) float32: the summed loss, and k other sums for the log
LossFunction = Callable[[nn.Module, Any, torch.device], torch.Tensor]


def next_token_loss(model: nn.Module, rows: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return the loss summed over all targets, (1,) float32, of rows (B, T + 1) int64 on the host."""
    idx, targets = inputs_and_targets(rows, device)  # copied to the device without waiting
    return model(idx, targets, reduction="sum")[None]


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
    sums = torch.zeros(1, device=ranks.device)  # of the loss and, if the loss function returns them, of other values
    for i, rows in enumerate(batch.micro_batches):
        if isinstance(model, DistributedDataParallel):  # all-reduce in the last backward pass; DDP reads it in forward
            model.require_backward_grad_sync = i == len(batch.micro_batches) - 1
        with autocast(ranks.device, state.dtype):
            losses = loss_function(model, rows, ranks.device)
        # times world_size, since DDP averages over ranks
        (losses[0] * (ranks.world_size / batch.num_targets)).backward()
        sums = sums + losses.detach()

    parameters = optim.parameters_of(state.optimizers)
    if state.grad_clip > 0:
        norm = clip_grad_norm_(parameters, state.grad_clip)
    else:
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    nonfinite = ~sums[0].isfinite() | ranks.pop_nonfinite_flag()  # on this rank, for the message
    weights = checksum(parameters) if compare else None
    local = StepStatus.of_rank(ranks.rank, ranks.world_size, sums / batch.num_targets, nonfinite, stop, weights)
    status = StepStatus.unpack(ranks.all_reduce(local.pack()), len(sums) - 1)  # sums over ranks, flags per rank
    status.grad_norm = norm  # before clipping, and equal on all ranks
    status.skip_update, status.z_score = state.guard.judge(status.loss, norm)

    for optimizer in state.optimizers:  # if found_inf is 1, a step changes neither weights nor optimizer state
        optimizer.found_inf = status.skip_update  # type: ignore[attr-defined]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return status.pack()


# ---------------------------------------------------------------------------------------------------------
# the objective


class Objective(Protocol):
    """What a run trains and validates on: `Pretraining`, or an objective of finetune.py."""

    tokenizer: Tokenizer
    identity: dict[str, dict]  # settings that must not change on resume
    columns: tuple[str, ...]  # of the log, for the values that `loss` returns after the loss

    @property
    def config(self) -> Config: ...
    def adapt(self, weights: Pretrained) -> Pretrained: ...
    def summary(self, ranks: Ranks) -> str: ...
    def batches(self, position: Position, ranks: Ranks) -> Prefetcher[Batch]: ...
    def loss(self, model: nn.Module, micro_batch: Any, device: torch.device) -> torch.Tensor: ...
    def validate(self, model: nn.Module, ranks: Ranks, stop: Stop) -> Row: ...
    def complete(self, model: GPT, params: SamplingParams, stop: Stop) -> list[str]: ...


class Pretraining:
    """Next-token prediction on the rows of a dataset."""

    columns: tuple[str, ...] = ()

    def __init__(self, config: Config, dataset: Dataset):
        self.config, self.dataset = config, dataset
        self.tokenizer = load_tokenizer(dataset.tokenizer)
        dataset.check_tokenizer(self.tokenizer, dataset.tokenizer)
        self.order = Order(
            dataset.train, dataset.eot_id, config.model.block_size, config.data.num_streams, config.general.seed,
            config.data.chunk_tokens, version=config.data.order,
        )  # fmt: skip
        self.rows_per_step = config.training.batch_tokens // config.model.block_size
        self.order.check(self.rows_per_step)
        self.identity = run_dir.identity_of(config, dataset, self.order, self.tokenizer)

    def adapt(self, weights: Pretrained) -> Pretrained:
        """Return the weights of another model for the model of this run. ConfigError if they do not fit."""
        self.dataset.check_tokenizer(weights.tokenizer, weights.source)
        return weights.adapt(asdict(self.config.model))

    def summary(self, ranks: Ranks) -> str:
        """Return a description of the batches and the data order, and log warnings."""
        training = self.config.training
        batch = (training.batch_tokens, self.order.block_size, training.micro_batch_size, ranks.world_size)
        repetition = self.order.repetition_warning(training.batch_tokens, training.max_steps)
        for warning in filter(None, (micro_batch_warning(*batch), repetition)):
            console.warning(warning)
        if self.dataset.manifest is None:
            console.warning(
                f"{self.dataset.directory} has no dataset.json. Its tokens cannot be verified and are assumed to be "
                "GPT-2's."
            )
        micro_batches = self.rows_per_step // (training.micro_batch_size * ranks.world_size)
        order = self.order.summary(training.batch_tokens, training.max_steps)
        return f"{counted(micro_batches, 'micro-batch')} per rank and step; {order}"

    def batches(self, position: Position, ranks: Ranks) -> DataLoader:
        rows, micro_batch_size = self.rows_per_step, self.config.training.micro_batch_size
        return DataLoader(
            self.order, position, rows, micro_batch_size, ranks.rank, ranks.world_size, ranks.device
        )  # fmt: skip

    def loss(self, model: nn.Module, micro_batch: torch.Tensor, device: torch.device) -> torch.Tensor:
        return next_token_loss(model, micro_batch, device)

    def validate(self, model: nn.Module, ranks: Ranks, stop: Stop) -> Row:
        loss, bits_per_byte = validate(model, self.dataset, self.tokenizer, self.config, ranks, stop)
        return {"val_loss": loss, "val_bpb": bits_per_byte}

    def complete(self, model: GPT, params: SamplingParams, stop: Stop) -> list[str]:
        return complete(model, self.tokenizer, self.config.sampling, params, stop)


def validate(
    model: nn.Module, dataset: Dataset, tokenizer: Tokenizer, config: Config, ranks: Ranks,
    stop: Stop = lambda: False,
) -> tuple[float, float]:  # fmt: skip
    """Return the mean loss over the validation tokens, in nats per token and in bits per byte.

    All ranks raise StopRequested if `stop()` is true on any of them.
    """
    block_size = cast(GPT, model).config.block_size  # a compiled model has the attribute too
    rows = (block_size, config.training.micro_batch_size, ranks.rank, ranks.world_size, ranks.device.type == "cuda")
    token_bytes = torch.from_numpy(tokenizer.token_bytes())
    return mean_loss(model, validation_batches(dataset.val, *rows), token_bytes, ranks, config.training.dtype, stop)


def complete(model: GPT, tokenizer: Tokenizer, sampling: Sampling, params: SamplingParams, stop: Stop) -> list[str]:
    """Return the prompt followed by each of its completions."""
    texts = sample(model, tokenizer, [sampling.prompt] * sampling.num_samples, params, stop=stop)
    return [sampling.prompt + text for text in texts]


# ---------------------------------------------------------------------------------------------------------
# setup


@dataclass
class Run:
    """Everything that the training loop needs."""

    config: Config
    objective: Objective
    start: InitialState
    ranks: Ranks
    raw_model: GPT  # used for checkpoints, HellaSwag and samples
    fast_model: nn.Module  # raw_model, compiled if requested: used for validation, and wrapped by state.model
    state: TrainState
    examples: list[Example]  # HellaSwag
    task_examples: dict[tasks.TaskName, list[Example]]
    metrics: Metrics


def set_up(objective: Objective, ranks: Ranks) -> Run:
    """Build the model, the optimizers and the log, and print a description of the run."""
    config, tokenizer = objective.config, objective.tokenizer
    training = config.training
    examples, task_examples = list[Example](), dict[tasks.TaskName, list[Example]]()
    if "eval" in config.general.mode and config.evaluation.every_n_steps > 0:
        examples, task_examples = load_evaluation(config, tokenizer, ranks)
    if "sample" in config.general.mode:
        tokenizer.encode(config.sampling.prompt)  # an error now rather than at the first samples

    start = restore_or_initialize(config, objective.identity, objective.adapt, ranks)
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
        config.general.out_dir, ranks, start.step, training.max_steps, flops,
        training.compare_ranks_every_n_steps, config.logging.every_n_steps, config.logging.tracker, to_json(config),
        objective.columns,
    )  # fmt: skip
    describe(config, raw_model, objective, ranks, compiled)
    return Run(
        config, objective, start, ranks, raw_model, fast_model, state, examples, task_examples, metrics
    )  # fmt: skip


def load_evaluation(
    config: Config, tokenizer: Tokenizer, ranks: Ranks
) -> tuple[list[Example], dict[tasks.TaskName, list[Example]]]:
    """Return the examples of HellaSwag and of --evaluation.tasks."""
    settings = config.evaluation
    examples = fetch_examples(settings.file, settings.language, tokenizer, settings.style, settings.limit, ranks)
    return examples, tasks.load_tasks(settings.tasks, tokenizer, settings.limit, ranks)


def describe(config: Config, model: GPT, objective: Objective, ranks: Ranks, compiled: bool) -> None:
    """Print the settings, the model, the data order, and warnings."""
    training = config.training
    family = "modern" if isinstance(config.model, ModernConfig) else "gpt2"
    settings = run_dir.format_settings(to_json(config), to_json(preset(family)))
    console.info(f"Settings that differ from the preset {family} (config.json lists all settings):\n{settings}")
    bfloat16 = uses_bfloat16(ranks.device, training.dtype)
    kernel = training_backend(config.model, config.model.mask_rule, ranks.device, bfloat16, compiled)
    console.info(f"{model.num_params():,} parameters on {ranks.world_size} x {ranks.device.type}, {kernel} attention")
    if compiled:
        console.info("Compiling the model. The first step may take a minute or more")
    console.info(objective.summary(ranks))
    if warning := untested_torch_warning():
        console.warning(warning)


# ---------------------------------------------------------------------------------------------------------
# periodic tasks


def generate_samples(
    model: GPT, complete: Callable[[GPT, SamplingParams, Stop], list[str]], config: Config, step: int, ranks: Ranks,
    stop: Stop = lambda: False,
) -> list[str]:  # fmt: skip
    """Return `complete(...)`. All ranks raise StopRequested if `stop()` is true on any of them."""
    sampling, seed = config.sampling, derive_seed(config.general.seed, step)
    params = SamplingParams(sampling.max_new_tokens, sampling.temperature, sampling.top_k, sampling.top_p, seed)
    with autocast(ranks.device, config.training.dtype):
        texts = complete(model, params, stop)
    if ranks.sum([stop()])[0]:
        raise StopRequested
    return texts


def run_tasks(run: Run, due: Due, step: int, stop: Stop) -> Row:
    """Run the tasks that are due, except for the checkpoint, and return their scores for the log."""
    config, ranks, row = run.config, run.ranks, Row()
    if due.validation:
        row |= (scores := run.objective.validate(run.fast_model, ranks, stop))
        console.info(f"step {step:>6} | {format_validation(scores)}")
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
        texts = generate_samples(run.raw_model, run.objective.complete, config, step, ranks, stop)
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
    saver.save(step, checkpoint.model_tensors(run.raw_model), optimizer, progress | run.objective.identity)


# ---------------------------------------------------------------------------------------------------------
# the loop


def train(run: Run, signals: StopSignals, saver: Saver, until: int | None = None) -> None:
    """Train to the last step. At step `until`, stop as if a stop signal had arrived (tools/replay.py uses this)."""
    config, ranks, metrics, start = run.config, run.ranks, run.metrics, run.start
    training, max_steps = config.training, config.training.max_steps
    tokens, position = start.tokens, start.position
    schedule, lr_schedule = make_schedules(config, start.step)
    # reads each status one step late, so the host never waits
    monitor = StepMonitor(ranks.device, metrics.record, len(run.objective.columns))
    batches = run.objective.batches(position, ranks)
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
        batch = next(batches)
        if batch.start.epoch > position.epoch:
            console.info(f"Epoch {batch.start.epoch} starts")
        row |= {"epoch": batch.start.epoch, "step_tokens": batch.num_tokens}
        row["lr"] = optim.set_learning_rates(run.state.optimizers, lr_schedule, step)
        compare = training.compare_ranks_every_n_steps > 0 and step % training.compare_ranks_every_n_steps == 0
        stop = signals.requested or saver.error is not None  # if a save fails, all ranks stop
        monitor.start()
        seed = derive_seed(config.general.seed, step, ranks.rank)
        status = train_step(run.state, batch, run.objective.loss, seed, stop=stop, compare=compare)
        monitor.push(row, status)
        tokens, position = tokens + batch.num_tokens, batch.end

    batches.close()
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
        console.info(format_validation({"val_loss": loss, "val_bpb": bits_per_byte}))
    if "eval" in config.general.mode:
        examples, task_examples = load_evaluation(config, tokenizer, ranks)
        scores = evaluate(model, examples, config.evaluation.style, ranks, config.training.dtype)
        task_scores = tasks.evaluate_all(model, task_examples, ranks, config.training.dtype)
        for score in (*scores.values(), *task_scores):
            console.info(str(score))
    if "sample" in config.general.mode:

        def complete_prompt(model: GPT, params: SamplingParams, stop: Stop) -> list[str]:
            return complete(model, tokenizer, config.sampling, params, stop)

        for text in generate_samples(model, complete_prompt, config, model.step or 0, ranks):
            console.info(f"---\n{text}")


def launch_run(
    config: Config, make_objective: Callable[[Config, Ranks], Objective], group: AbstractContextManager[Ranks]
) -> None:
    """Train a run in its locked directory, from start or resume to its last step or a stop signal."""
    general, saving = config.general, config.saving
    with StopSignals() as signals, group as ranks:
        config = with_micro_batch_size(config, ranks.memory_for(config.training.dtype), ranks.world_size)
        training, rows = config.training, config.training.batch_tokens // config.model.block_size // ranks.world_size
        advice = memory_advice(rows, training.micro_batch_size, training.activation_checkpointing)
        with (
            explain_failures(ranks, advice),
            run_dir.lock_run_dir(general.out_dir, ranks),
            Saver(general.out_dir, saving.keep, saving.keep_every) as saver,
        ):
            objective = make_objective(config, ranks)
            signals.marker = general.out_dir / run_dir.STOPPED
            train(set_up(objective, ranks), signals, saver)  # the run is freed before the process group


def main() -> None:
    _, config = parse(sys.argv[1:])
    config = resolve(config, int(os.environ.get("WORLD_SIZE", "1")))
    general, dataset = config.general, None
    if {"train", "val"} & set(general.mode):
        dataset = open_dataset(config.data.dataset)
        config = bind(config, dataset)
    group = process_group(general.device, general.timeout_minutes, general.deterministic)
    if "train" not in general.mode:
        with group as ranks, explain_failures(ranks, memory_advice(0, 0, activation_checkpointing=True)):
            return evaluate_checkpoint(config, dataset, ranks)
    assert dataset is not None, "opened above, since the mode includes train"
    launch_run(config, lambda config, ranks: Pretraining(config, dataset), group)


if __name__ == "__main__":
    run_script(main)
