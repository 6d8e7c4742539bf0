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
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_, get_total_norm
from tqdm import tqdm

import checkpoint
from dataloader import IGNORED, DataLoader, Order, Position, Step, inputs_and_targets, validation_batches
from distributed import Mark, Ranks, StopSignals, autocast, peak_flops, peak_memory_mib, process_group
from errors import ConfigError, UserError, run
from hellaswag import Example, evaluate, fetch, load_examples
from log import Log, Samples
from model import GPT
from optim import adamw, learning_rate, load_optimizer_state, optimizer_state
from plot import plot
from sample import sample
from shards import Dataset, write_json
from tokenizer import Tokenizer, load_tokenizer
from train_config import Config, differences, parse, read_config, resolve, to_json

# ---------------------------------------------------------------------------------------------------------
# set-up


@dataclass
class Start:
    """What the loop begins with. `position` is the place in the data, `tokens` were trained on before."""

    model: GPT
    optimizer: dict | None  # tensors to put into it, of a resumed run
    step: int
    tokens: int
    position: Position


def begin(config: Config, dataset: Dataset, order: Order, tokenizer: Tokenizer, ranks: Ranks) -> Start:
    """The weights and the place to begin at, as --general.init-from says; writes config.json."""
    out, init_from = Path(config.general.out_dir), config.general.init_from
    found = None
    if init_from == "resume":
        found = checkpoint.latest(out)
    elif (out / "config.json").exists() or checkpoint.checkpoints(out):
        raise ConfigError(
            f"{out} holds a run already. Go on with it: --general.init-from resume, or begin another beside it: "
            "--general.out-dir out/NAME."
        )
    state = checkpoint.read_state(found) if found else {}
    if found:
        _refuse_other_run(state, _identity(config, dataset, order, tokenizer), found)
        ranks.print(f"resuming {found}")
        for name, earlier, now in differences(read_config(out / "config.json"), to_json(config)):
            if not name.startswith("general."):
                ranks.print(f"  {name} was {earlier}, is {now} now")
    torch.manual_seed(config.general.seed)
    if found:
        loaded = checkpoint.load(found)
        model = GPT(config.model)
        checkpoint.load_model_tensors(model, loaded.model)
        start = Start(model, loaded.optimizer, state["step"], state["tokens"], Position(**state["position"]))
    elif init_from in ("scratch", "resume"):
        start = Start(GPT(config.model), None, 0, 0, Position())
    else:
        model = ranks.main_first(lambda: checkpoint.load_model(init_from, torch.device("cpu"))).model
        start = Start(_fitted(model, config, init_from), None, 0, 0, Position())

    ranks.wait()  # all have looked at the folder before rank 0 writes to it
    if ranks.is_main:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "config.json", to_json(config))
        if tokenizer.name != "gpt2":
            shutil.copyfile(tokenizer.file, out / tokenizer.name)
    return start


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
    tensors["wpe.weight"] = tensors["wpe.weight"][: config.model.block_size]
    checkpoint.load_model_tensors(model, tensors)
    return model


def _identity(config: Config, dataset: Dataset, order: Order, tokenizer: Tokenizer) -> dict:
    """What a run can't change when it is resumed: architecture, data and their order."""
    return {
        "model": asdict(config.model),
        "data": {
            "fingerprint": dataset.fingerprint, "block_size": order.block_size, "num_streams": order.num_streams,
            "chunk_tokens": order.chunk_tokens, "seed": order.seed,
        },
        "tokenizer": {"name": tokenizer.name, "sha256": tokenizer.sha256},
    }  # fmt: skip


def _refuse_other_run(state: dict, identity: dict, path: Path) -> None:
    wrong = [
        f"  {section}.{name}: {state[section].get(name)} there, {value} now\n"
        for section, values in identity.items()
        for name, value in values.items()
        if state[section].get(name) != value
    ]
    if wrong:
        raise ConfigError(
            f"{path} can't be gone on with: model and order of the data must stay.\n{''.join(wrong)}"
            "Give the earlier values, or begin anew with another --general.out-dir."
        )


def mix(*numbers: int) -> int:
    """A seed from several numbers, 63 bits."""
    digest = hashlib.blake2b(" ".join(map(str, numbers)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


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


# ---------------------------------------------------------------------------------------------------------
# the training step


@dataclass
class Pending:
    """A step that is on its way: its row of the log, and what the host will read of it a step later."""

    row: dict
    status: torch.Tensor  # on the host, complete once `end` has been waited for
    begin: Mark
    end: Mark


def train_step(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, data: Step, lr: float, config: Config, ranks: Ranks,
    seed: int, halted: torch.Tensor, stop: bool,
) -> torch.Tensor:  # fmt: skip
    """One update from all micro-batches of a step. Returns the status, (3 + W,) float32 on the device: mean
    loss, gradient norm, how many ranks were told to stop, and for each rank whether its loss isn't finite.

    `halted`, () float32, becomes 1 at the first loss or norm that isn't finite, and from then on no update
    is applied: the gate is on the device, so the host need not wait to see the numbers.
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

    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if config.optimizer.grad_clip > 0:
        norm = clip_grad_norm_(parameters, config.optimizer.grad_clip)
    else:
        norm = get_total_norm([p.grad for p in parameters])
    status = torch.zeros(3 + ranks.world_size, device=ranks.device)
    status[0] = loss_sum / data.targets
    status[2] = float(stop)
    status[3 + ranks.rank] = ~loss_sum.isfinite()
    ranks.all_reduce(status)
    status[1] = norm
    halted.copy_(torch.maximum(halted, (~status[:2].isfinite()).any().float()))

    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.found_inf = halted
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return status


# ---------------------------------------------------------------------------------------------------------
# the scenes


@torch.no_grad()
def validate(
    model: GPT, dataset: Dataset, token_bytes: torch.Tensor, config: Config, ranks: Ranks
) -> tuple[float, float]:
    """Mean loss over the validation tokens, in nats a token, and the same in bits a byte of their text."""
    was_training = model.training
    model.eval()
    nats = count = text_bytes = 0.0
    batches = validation_batches(
        dataset.val, model.config.block_size, config.training.micro_batch_size, ranks.rank, ranks.world_size
    )
    for idx, targets in batches:
        with autocast(ranks.device, config.training.dtype):
            nats += model(idx.to(ranks.device), targets.to(ranks.device)).item()
        counted = targets[targets != IGNORED]
        count += counted.numel()
        text_bytes += token_bytes[counted].sum().item()
    model.train(was_training)
    nats, count, text_bytes = ranks.sum([nats, count, text_bytes])
    return nats / count, nats / math.log(2) / text_bytes


def write_samples(model: GPT, tokenizer: Tokenizer, config: Config, step: int) -> list[str]:
    s = config.sampling
    texts = sample(
        model, tokenizer, s.prompt, s.num_samples, s.max_new_tokens, s.temperature, s.top_k, s.top_p,
        mix(config.general.seed, step), config.training.dtype,
    )  # fmt: skip
    return [s.prompt + text for text in texts]


def hellaswag_examples(config: Config, tokenizer: Tokenizer, ranks: Ranks) -> list[Example]:
    e = config.evaluation
    return load_examples(ranks.main_first(lambda: fetch(e.file, e.language)), tokenizer, e.style, e.limit)


# ---------------------------------------------------------------------------------------------------------
# training


def train(config: Config, dataset: Dataset, ranks: Ranks, signals: StopSignals) -> None:
    device, out, max_steps = ranks.device, Path(config.general.out_dir), config.training.max_steps
    tokenizer = load_tokenizer(dataset.tokenizer)
    if dataset.tokenizer_sha256 not in (None, tokenizer.sha256):
        raise ConfigError(f"{dataset.tokenizer} is not the tokenizer that {dataset.folder} was made with.")
    order = Order(
        dataset.train, dataset.eot_id, config.model.block_size, config.data.num_streams, config.general.seed,
        config.data.chunk_tokens,
    )  # fmt: skip
    rows_per_step = config.training.batch_tokens // config.model.block_size
    order.check(rows_per_step)
    modes = config.general.mode
    examples = (
        hellaswag_examples(config, tokenizer, ranks) if "eval" in modes and config.evaluation.every_n_steps else []
    )

    start = begin(config, dataset, order, tokenizer, ranks)
    raw_model = start.model.to(device)  # what is saved, validated, evaluated and sampled
    o = config.optimizer
    optimizer = adamw(raw_model, o.weight_decay, o.beta1, o.beta2, o.eps)
    if start.optimizer:
        load_optimizer_state(optimizer, raw_model, start.optimizer)
    compiled = config.training.compile == "on" or (config.training.compile == "auto" and device.type == "cuda")
    model = torch.compile(raw_model, dynamic=False) if compiled else raw_model
    if ranks.world_size > 1:
        ids = [device.index] if device.type == "cuda" else None
        model = DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True)
    describe(config, order, raw_model, ranks)

    log = Log(out / "log.csv", start.step) if ranks.is_main else None
    samples = Samples(out / "samples.txt", start.step) if ranks.is_main else None
    token_bytes = torch.from_numpy(tokenizer.token_bytes())
    peak, flops = peak_flops(device), raw_model.flops_per_token()
    halted = torch.zeros((), device=device)
    bar = tqdm(total=max_steps, initial=start.step, unit="step", disable=None if ranks.is_main else True)
    loader = DataLoader(
        order, start.position, rows_per_step, config.training.micro_batch_size, ranks.rank, ranks.world_size,
        pin=device.type == "cuda",
    )  # fmt: skip

    def say(line: str) -> None:
        if ranks.is_main:
            tqdm.write(line)

    def finish(step: Pending) -> bool:
        """Reads a step's status, writes its row, and tells whether a rank was told to stop."""
        step.end.wait()
        loss, norm, stops, *not_finite = step.status.tolist()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            where = [rank for rank, flag in enumerate(not_finite) if flag]
            raise UserError(
                f"step {step.row['step']}: loss is {loss}, gradient norm {norm}"
                + (f", first on rank {where[0]}" if where else "")
                + ". The update was not applied and nothing of it saved. Go on from the last checkpoint with a lower "
                "--optimizer.max-lr: --general.init-from resume."
            )
        ms = step.end.ms_since(step.begin)
        speed = config.training.batch_tokens / ms * 1e3
        step.row |= {
            "loss": loss, "grad_norm": norm, "tokens_per_s": speed, "step_ms": ms,
            "mfu": speed * flops / (peak * ranks.world_size) if peak else None,
            "memory_mib": peak_memory_mib(device),
        }  # fmt: skip
        if log:
            log.write(step.row)
        bar.update()
        if config.logging.every_n_steps and step.row["step"] % config.logging.every_n_steps == 0:
            say(console_line(step.row))
        if step.row["step"] == start.step + 10:
            say(f"about {ms / 3.6e6 * (max_steps - step.row['step']):.1f} hours of training to go, without evaluations")
        return stops > 0

    tokens, position, pending, begin_mark = start.tokens, start.position, None, None
    stopping = False
    for step in range(start.step, max_steps + 1):
        last = step == max_steps

        def due(section: str, mode: str, step: int = step, last: bool = last) -> bool:
            n = getattr(config, section).every_n_steps
            return mode in modes and n > 0 and (last or step % n == 0)

        validating = due("validation", "val") and not stopping
        evaluating = due("evaluation", "eval") and step > 0 and not stopping
        sampling = due("sampling", "sample") and step > 0 and not stopping
        saving = (due("saving", "train") or stopping) and step > start.step
        row = {"step": step, "tokens": tokens, "epoch": position.epoch}
        if pending and (validating or evaluating or sampling or saving or last):
            stopping |= finish(pending)
            pending = begin_mark = None

        # --- validate
        if validating:
            row["val_loss"], row["val_bpb"] = validate(raw_model, dataset, token_bytes, config, ranks)
            say(f"step {step:>6} | validation loss {row['val_loss']:.4f} | {row['val_bpb']:.4f} bits a byte")

        # --- evaluate
        if evaluating:
            scores = evaluate(raw_model, examples, config.evaluation.style, ranks, config.training.dtype)
            say(f"step {step:>6} | " + " | ".join(map(str, scores.values())))
            if config.evaluation.style == "karpathy":
                row["hellaswag"] = scores["acc_norm"].value

        # --- sample
        if sampling:
            texts = write_samples(raw_model, tokenizer, config, step)
            if samples:
                samples.write(step, texts)
            say(f"step {step:>6} | {texts[0]}")

        # --- save
        if saving and ranks.is_main:
            state = {"step": step, "tokens": tokens, "position": asdict(position)}
            checkpoint.save(
                out, step, checkpoint.model_tensors(raw_model), optimizer_state(optimizer, raw_model),
                state | _identity(config, dataset, order, tokenizer), config.saving.keep,
            )  # fmt: skip
        if last or stopping:
            if last and log:
                log.write(row)
            break
        if (validating or evaluating) and log and step > start.step:
            plot([out], out / "plot.png")

        # --- step
        data = next(loader)
        if data.start.epoch > position.epoch:
            unread = len(dataset.train) - position.n * order.block_size
            say(f"epoch {data.start.epoch} begins; {unread:,} tokens of the one before stay unread")
        row["epoch"] = data.start.epoch
        row["lr"] = learning_rate(step, o.max_lr, o.min_lr_ratio, o.warmup_steps, max_steps)
        begin_mark = begin_mark or Mark(device)
        status = train_step(
            model, optimizer, data, row["lr"], config, ranks, mix(config.general.seed, step, ranks.rank), halted,
            stop=signals.received is not None,
        )  # fmt: skip
        end_mark = Mark(device)
        launched = Pending(row, status.to("cpu", non_blocking=True), begin_mark, end_mark)
        if pending:  # read a step late, while the device is busy with this one
            stopping |= finish(pending)
        pending, begin_mark = launched, end_mark
        tokens, position = tokens + config.training.batch_tokens, data.end

    loader.close()
    bar.close()
    if log:
        log.close()
        plot([out], out / "plot.png")
    if stopping and not last:
        say(f"stopped at step {step}, saved. Go on with the same command and --general.init-from resume.")


def console_line(row: dict) -> str:
    mfu = f" | mfu {row['mfu']:.1%}" if row["mfu"] else ""
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
    loaded = ranks.main_first(lambda: checkpoint.load_model(spec, ranks.device))
    tokenizer = load_tokenizer(loaded.tokenizer)
    ranks.print(f"{loaded.source}: {loaded.model.num_params():,} parameters")
    if "val" in config.general.mode:
        if dataset.tokenizer_sha256 not in (None, tokenizer.sha256):
            raise ConfigError(f"{dataset.folder} was made with another tokenizer than the model of {spec}.")
        loss, bpb = validate(loaded.model, dataset, torch.from_numpy(tokenizer.token_bytes()), config, ranks)
        ranks.print(f"validation loss {loss:.4f} | {bpb:.4f} bits a byte")
    if "eval" in config.general.mode:
        examples = hellaswag_examples(config, tokenizer, ranks)
        scores = evaluate(loaded.model, examples, config.evaluation.style, ranks, config.training.dtype)
        ranks.print(*scores.values(), sep="\n")
    if "sample" in config.general.mode:
        for text in write_samples(loaded.model, tokenizer, config, loaded.step or 0):
            ranks.print(f"---\n{text}")


def main() -> None:
    _, config = parse(sys.argv[1:])
    config, dataset = resolve(config, int(os.environ.get("WORLD_SIZE", "1")))
    with process_group(config.general.device) as ranks, StopSignals() as signals:
        if "train" in config.general.mode:
            train(config, dataset, ranks, signals)
        else:
            assess(config, dataset, ranks)


if __name__ == "__main__":
    run(main)
