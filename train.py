"""Trains a GPT, and validates, evaluates and samples it along the way. Settings: train_config.py.

    python train.py demo                                             # one process, CPU or one GPU
    torchrun --standalone --nproc_per_node=8 train.py                # GPT-2 124M on 8 GPUs
    python train.py gpt2 --general.init-from resume                  # first start, restart and requeue alike
    python train.py gpt2 --general.mode val eval                     # the latest checkpoint, nothing trained

A run writes out/<run>/: config.json, log.csv, samples.txt, plot.png and checkpoints/.
"""

import hashlib
import math
import os
import re
import statistics
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_, get_total_norm
from tqdm import tqdm

from babygpt.console import spoken
from babygpt.data.shards import Dataset
from babygpt.data.tokenizer import Tokenizer, load_tokenizer
from babygpt.errors import ConfigError, UserError
from babygpt.errors import run as run_script
from babygpt.training import checkpoint
from babygpt.training.device import Mark, autocast, peak_flops, peak_memory_mib, untested_torch_warning, uses_bfloat16
from babygpt.training.distributed import Ranks, process_group
from babygpt.training.guard import Gate, checksum
from babygpt.training.metrics import Log, Samples
from babygpt.training.optim import Optimizers, adamw, load_optimizer_state, muon, optimizer_state, set_rates
from babygpt.training.plots import plot
from babygpt.training.signals import Stopped, StopSignals
from dataloader import IGNORED, DataLoader, Order, Step, inputs_and_targets, validation_batches
from hellaswag import Example, check_length, evaluate, fetch, load_examples
from model import GPT
from sample import sample
from start import FINISHED, STOPPED, Start, begin, claim, describe, identity
from train_config import Config, parse, resolve, ways_to_less_memory

# ---------------------------------------------------------------------------------------------------------
# the training step


def mix(*numbers: int) -> int:
    """A seed from several numbers, 63 bits."""
    digest = hashlib.blake2b(" ".join(map(str, numbers)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@dataclass
class Pending:
    """A step that is on its way: its row of the log, and what the host will read of it a step later."""

    row: dict
    status: torch.Tensor  # on the host, complete once `end` has been waited for
    begin: Mark
    end: Mark


def train_step(
    model: torch.nn.Module, optimizers: Optimizers, data: Step, config: Config, ranks: Ranks, seed: int,
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
        if ranks.world_size > 1:  # read in the forward pass: gradients are averaged in the last backward alone
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
    status[4] = float(stop)
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
        optimizer.found_inf = held
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return status


# ---------------------------------------------------------------------------------------------------------
# the scenes


@torch.no_grad()
def validate(
    model: GPT, dataset: Dataset, tokenizer: Tokenizer, config: Config, ranks: Ranks,
    stop: Callable[[], bool] = lambda: False,
) -> tuple[float, float]:  # fmt: skip
    """Mean loss over the validation tokens, in nats a token, and the same in bits a byte of their text.

    Where `stop()` on any rank, all raise Stopped.
    """
    was_training = model.training
    model.eval()
    token_bytes = torch.from_numpy(tokenizer.token_bytes())
    nats = count = text_bytes = 0.0
    batches = validation_batches(
        dataset.val, model.config.block_size, config.training.micro_batch_size, ranks.rank, ranks.world_size
    )
    for idx, targets in batches:
        if stop():
            break
        with autocast(ranks.device, config.training.dtype):
            nats += model(idx.to(ranks.device), targets.to(ranks.device)).item()
        counted = targets[targets != IGNORED]
        count += counted.numel()
        text_bytes += token_bytes[counted].sum().item()
    model.train(was_training)
    nats, count, text_bytes, stops = ranks.sum([nats, count, text_bytes, stop()])
    if stops:
        raise Stopped
    if count == 0:
        raise ConfigError(f"{dataset.folder} has not one validation row of {model.config.block_size:,} tokens.")
    return nats / count, nats / math.log(2) / text_bytes


def write_samples(
    model: GPT, tokenizer: Tokenizer, config: Config, step: int, ranks: Ranks, stop: Callable[[], bool] = lambda: False
) -> list[str]:
    """Texts by the settings of sampling. Where `stop()` on any rank, all raise Stopped."""
    s = config.sampling
    texts = sample(
        model, tokenizer, [s.prompt] * s.num_samples, s.max_new_tokens, s.temperature, s.top_k, s.top_p,
        mix(config.general.seed, step), config.training.dtype, stop=stop,
    )  # fmt: skip
    if ranks.sum([stop()])[0]:
        raise Stopped
    return [s.prompt + text for text in texts]


def hellaswag_examples(config: Config, block_size: int, tokenizer: Tokenizer, ranks: Ranks) -> list[Example]:
    e = config.evaluation
    examples = load_examples(ranks.main_first(lambda: fetch(e.file, e.language)), tokenizer, e.style, e.limit)
    check_length(examples, block_size)
    return examples


# ---------------------------------------------------------------------------------------------------------
# training


SCENES = {"validation": "val", "evaluation": "eval", "sampling": "sample", "saving": "train"}  # section: mode
OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)
SPIKE = 6.0  # standard deviations above the losses before, from which on a loss is told of
SCORES = {"val_loss", "hellaswag"}  # columns that a picture is drawn for


@dataclass
class Run:
    """All that the scenes share. `raw_model` is what is saved, validated, evaluated and sampled; `model` is the
    same weights, compiled and wrapped for training. Log, samples and bar are rank 0's."""

    config: Config
    dataset: Dataset
    ranks: Ranks
    tokenizer: Tokenizer
    order: Order
    start: Start
    raw_model: GPT
    model: torch.nn.Module
    optimizers: Optimizers
    examples: list[Example]
    log: Log | None = None
    samples: Samples | None = None
    bar: tqdm | None = None

    def due(self, step: int) -> set[str]:
        """The scenes that come before update `step`: every n steps and behind the last, at step 0 only the first.

        What a run begins with is not saved again.
        """
        config, found = self.config, set()
        for scene, mode in SCENES.items():
            n = getattr(config, scene).every_n_steps
            if mode in config.general.mode and n > 0 and (step % n == 0 or step == config.training.max_steps):
                found.add(scene)
        if step == self.start.step:
            found.discard("saving")
        return found & {"validation"} if step == 0 else found

    def say(self, line: str) -> None:
        if self.ranks.is_main:
            with spoken():
                tqdm.write(line)
                sys.stdout.flush()  # into a file too, line by line

    def plot(self) -> None:
        if self.ranks.is_main:
            out = Path(self.config.general.out_dir)
            plot([out], out / "plot.png")


def make_optimizers(model: GPT, config: Config) -> Optimizers:
    o = config.optimizer
    adam = {"weight_decay": o.weight_decay, "beta1": o.beta1, "beta2": o.beta2, "eps": o.eps}
    if o.name == "adamw":
        return adamw(model, o.max_lr, **adam)
    return muon(model, o.max_lr, o.embedding_lr, o.head_lr, o.scalar_lr, **adam, cautious=o.cautious)


def set_up(config: Config, dataset: Dataset, ranks: Ranks) -> Run:
    """Everything from the settings to the first step: order, examples, weights, optimizer, log."""
    device, out = ranks.device, Path(config.general.out_dir)
    tokenizer = load_tokenizer(dataset.tokenizer)
    if dataset.tokenizer_sha256 not in (None, tokenizer.sha256):
        raise ConfigError(f"{dataset.tokenizer} is not the tokenizer that {dataset.folder} was made with.")
    order = Order(
        dataset.train, dataset.eot_id, config.model.block_size, config.data.num_streams, config.general.seed,
        config.data.chunk_tokens,
    )  # fmt: skip
    order.check(config.training.batch_tokens // config.model.block_size)
    evaluating = "eval" in config.general.mode and config.evaluation.every_n_steps > 0
    examples = hellaswag_examples(config, config.model.block_size, tokenizer, ranks) if evaluating else []

    start = begin(config, dataset, order, tokenizer, ranks)
    raw_model = start.model.to(device)
    raw_model.recompute = config.training.activation_checkpointing
    optimizers = make_optimizers(raw_model, config)
    if start.optimizer:
        load_optimizer_state(optimizers, raw_model, start.optimizer)
    compiled = config.training.compile == "on" or (config.training.compile == "auto" and device.type == "cuda")
    model = torch.compile(raw_model, dynamic=False) if compiled else raw_model
    if ranks.world_size > 1:
        ids = [device.index] if device.type == "cuda" else None
        model = DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
        ranks.watch(model)

    describe(config, order, raw_model, ranks)
    if warning := untested_torch_warning():
        ranks.print(warning)
    if dataset.manifest is None:
        ranks.print(f"warning: {dataset.folder} has no dataset.json: its tokens are taken for GPT-2's, unverified")
    run = Run(config, dataset, ranks, tokenizer, order, start, raw_model, model, optimizers, examples)
    if ranks.is_main:
        run.log = Log(out / "log.csv", start.step)
        run.samples = Samples(out / "samples.txt", start.step)
        run.bar = tqdm(total=config.training.max_steps, initial=start.step, unit="step", disable=None)
    return run


def finish(run: Run, pending: Pending) -> bool:
    """Reads the status of a step, writes its row of the log, and tells whether a rank was told to stop."""
    pending.end.wait()
    loss, norm, z, held, stops, *of_ranks = pending.status.tolist()
    not_finite, sums = of_ranks[: run.ranks.world_size], of_ranks[run.ranks.world_size :]
    row, step = pending.row, pending.row["step"]
    if not (math.isfinite(loss) and math.isfinite(norm)):
        where = [rank for rank, flag in enumerate(not_finite) if flag]
        raise ConfigError(  # the status is the same on every rank
            f"step {step}: loss is {loss}, gradient norm {norm}"
            + (f", first on rank {where[0]}" if where else "")
            + ". The update was not applied and nothing of it saved. Go on from the last checkpoint with a lower "
            "--optimizer.max-lr: --general.init-from resume."
        )
    if norm == 0:
        raise ConfigError(
            f"step {step}: the gradient norm is exactly 0, so the loss ({loss:.4f}) does not depend on any weight. The "
            "update was not applied. Run `bash runs/test.sh`: the model, or a kernel of this PyTorch version "
            f"({torch.__version__}), computes wrong gradients; --training.compile off may avoid it."
        )
    if differing := [rank for rank, value in enumerate(sums) if value != statistics.mode(sums)]:
        good = max(0, step - run.config.training.compare_ranks_every_n_steps)
        raise ConfigError(
            f"step {step}: the weights of rank {', '.join(map(str, differing))} are not those of the others. A card or "
            f"memory may be faulty there, or differ in kind. They were the same at step {good}: delete later "
            "checkpoints, and go on without it: --general.init-from resume."
        )
    if z > SPIKE or held:
        run.say(
            f"step {step:>6} | the loss, {loss:.4f}, is {z:.1f} standard deviations above those before"
            + (": its update is left out" if held else "")
        )
    row["loss"], row["grad_norm"] = loss, norm
    row["step_ms"] = pending.end.ms_since(pending.begin)
    row["tokens_per_s"] = run.config.training.batch_tokens / row["step_ms"] * 1e3
    peak = peak_flops(run.ranks.device)
    if peak and uses_bfloat16(run.ranks.device, run.config.training.dtype):
        row["mfu"] = row["tokens_per_s"] * run.raw_model.flops_per_token() / (peak * run.ranks.world_size)
    row["memory_mib"] = peak_memory_mib(run.ranks.device)
    if run.ranks.is_main:
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
    out, max_steps, o = Path(config.general.out_dir), config.training.max_steps, config.optimizer
    tokens, position, compared = run.start.tokens, run.start.position, config.training.compare_ranks_every_n_steps
    loader = DataLoader(
        run.order, position, config.training.batch_tokens // config.model.block_size,
        config.training.micro_batch_size, ranks.rank, ranks.world_size, pin=ranks.device.type == "cuda",
    )  # fmt: skip
    gate = Gate(ranks.device, config.training.skip_spikes, run.start.losses)
    pending: Pending | None = None  # the step before, whose status the host has not read
    begin_mark: Mark | None = None  # where the time of the next step begins; None behind other work
    stopping = False

    for step in range(run.start.step, max_steps + 1):
        last, ranks.doing = step == max_steps, f"what comes before step {step}"
        row = {"step": step, "tokens": tokens, "epoch": position.epoch}
        due = run.due(step)
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
                    raw_model, run.dataset, run.tokenizer, config, ranks, signals.told
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
                if ranks.is_main:
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
            run.model, run.optimizers, data, config, ranks, mix(config.general.seed, step, ranks.rank), gate,
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


def console_line(row: dict) -> str:
    mfu = f" | mfu {row['mfu']:.1%}" if "mfu" in row else ""
    return (
        f"step {row['step']:>6} | loss {row['loss']:.4f} | lr {row['lr']:.2e} | norm {row['grad_norm']:.3f} | "
        f"{row['step_ms']:,.0f} ms | {row['tokens_per_s']:,.0f} tokens/s{mfu}"
    )


# ---------------------------------------------------------------------------------------------------------
# without training


def assess(config: Config, dataset: Dataset | None, ranks: Ranks) -> None:
    """Validates, evaluates and samples a checkpoint (or GPT-2's own weights); the run's log stays as it is."""
    init_from = config.general.init_from
    spec = config.general.out_dir if init_from in ("scratch", "resume") else init_from
    model = ranks.main_first(lambda: GPT.from_pretrained(spec, ranks.device))
    tokenizer = model.tokenizer
    ranks.print(f"{model.source}: {model.num_params():,} parameters")
    if "val" in config.general.mode:
        if dataset.tokenizer_sha256 not in (None, tokenizer.sha256):
            raise ConfigError(f"{dataset.folder} was made with another tokenizer than the model of {spec}.")
        loss, bpb = validate(model, dataset, tokenizer, config, ranks)
        ranks.print(f"validation loss {loss:.4f} | {bpb:.4f} bits a byte")
    if "eval" in config.general.mode:
        examples = hellaswag_examples(config, model.config.block_size, tokenizer, ranks)
        scores = evaluate(model, examples, config.evaluation.style, ranks, config.training.dtype)
        ranks.print(*scores.values(), sep="\n")
    if "sample" in config.general.mode:
        for text in write_samples(model, tokenizer, config, model.step or 0, ranks):
            ranks.print(f"---\n{text}")


def main() -> None:
    _, config = parse(sys.argv[1:])
    config, dataset = resolve(config, int(os.environ.get("WORLD_SIZE", "1")))
    out, general, s = Path(config.general.out_dir), config.general, config.saving
    training = "train" in general.mode
    with (
        StopSignals() if training else nullcontext() as signals,
        process_group(general.device, general.timeout_minutes) as ranks,
    ):
        if not training:
            return assess(config, dataset, ranks)
        try:
            with claim(out, ranks), checkpoint.Saver(out, s.keep, s.keep_every) as saver:
                signals.marker = out / STOPPED
                train(set_up(config, dataset, ranks), signals, saver)  # no name holds the model when the ranks part
        except OSError as error:  # of the log, the samples, the picture; a checkpoint's is told by itself
            raise UserError(f"{error} in {ranks.doing}. What was saved is whole: mend it and resume.") from None
        except (RuntimeError, MemoryError) as error:
            if not isinstance(error, OUT_OF_MEMORY) and not re.search("can't allocate memory|ALLOC_FAILED", str(error)):
                raise
            what, ways = (str(error).splitlines() or [""])[0], ways_to_less_memory(config, ranks.world_size)
            raise UserError(f"out of memory in {ranks.doing} ({what:.100}). {ways}") from None


if __name__ == "__main__":
    run_script(main)
