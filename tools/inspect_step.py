"""Print the rows that a run read in one optimizer step, and their text.

    python -m tools.inspect_step out/gpt2 --step 1234

A row has block_size + 1 tokens, the last of which is only a target. If a row crosses the end of a chunk or shard, each
piece has its own line. Each line shows the shard, the position of the piece's first token in the shard, the number of
tokens, and the number of the document that contains the first token. The documents of a shard are numbered from 1;
document 0 started in an earlier shard.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import numpy as np

from babygpt.constraints import NonNegative, Positive, RunArgument, metavar, parse_arguments
from babygpt.data.shards import Dataset, open_dataset
from babygpt.data.tokenizer import load_tokenizer
from babygpt.errors import UserError, run
from babygpt.training.checkpoint import latest, read_state
from babygpt.training.log import read_log
from babygpt.training.run_dir import read_config
from dataloader import Order, Position


def position_of_step(step: int, rows: Sequence[int], order: Order) -> Position:
    """Return the position at which a step starts, if step k reads rows[k] rows."""
    position = Position()
    for k in range(step):
        start = order.step_start(position, rows[k])
        position = Position(start.epoch, start.n + rows[k])
    return order.step_start(position, rows[step])


def read_run(run: Path, step: int) -> tuple[Dataset, Order, list[int]]:
    """Return the dataset of a run, the data order, and the number of rows of each step, at least up to `step`.

    The numbers of rows follow from the tokens in log.csv, since a resume may change the batch size. Steps that are not
    in the log yet use batch_tokens of config.json. UserError if files are missing or the dataset has changed.
    """
    config = read_config(run / "config.json")
    if not {"general", "data", "model", "training"} <= set(config):
        raise UserError(f"There is no run at {run}: it has no intact config.json. Use a directory that train.py wrote.")
    if "chat" in config:
        raise UserError(f"{run} is a run of finetune.py, which this tool does not support. Use a run of train.py.")
    data, training, block_size = config["data"], config["training"], config["model"]["block_size"]
    if not 0 <= step < training["max_steps"]:
        raise UserError(f"--step {step} is out of range: {run} has steps 0 to {training['max_steps'] - 1}.")
    if not Path(data["dataset"]).is_dir():
        raise UserError(
            f"The dataset of {run} is not at {data['dataset']}. Restore it, or change to the directory in which "
            "train.py ran."
        )
    dataset, checkpoint = open_dataset(data["dataset"]), latest(run)
    state = read_state(checkpoint) if checkpoint else None
    if state and state["data"]["fingerprint"] != dataset.fingerprint:
        raise UserError(
            f"{dataset.directory} is not the dataset that {run} was trained on: its fingerprint is "
            f"{dataset.fingerprint[:16]}, but {checkpoint} has {state['data']['fingerprint'][:16]}. Restore the "
            "original dataset."
        )
    log = read_log(run / "log.csv") if (run / "log.csv").exists() else []
    tokens = [row["tokens"] for row in log]
    if [row["step"] for row in log] != list(range(len(log))):
        raise UserError(
            f"{run / 'log.csv'} is missing some steps, so it is unknown which rows a step read. Restore the complete "
            "log.csv."
        )
    if state and state["step"] == len(tokens):
        tokens.append(state["tokens"])  # a stopped run: the tokens after its last step
    rows = [(after - before) // block_size for before, after in pairwise(tokens)]
    rows += [training["batch_tokens"] // block_size] * (step + 1 - len(rows))
    order = Order(
        dataset.train, dataset.eot_id, block_size, data["num_streams"], config["general"]["seed"], data["chunk_tokens"],
        version=data.get("order", 1),
    )  # fmt: skip
    order.check(rows[step])
    return dataset, order, rows


def describe_rows(
    dataset: Dataset, order: Order, epoch: int, rows: range, num_ranks: int, max_chars: int
) -> Iterator[str]:
    """Yield a table with one line for each part of each row: for each chunk and shard that the row reads from."""
    tokenizer, document_starts = load_tokenizer(dataset.tokenizer), {}  # by index of the shard
    shard_names = [  # an empty shard is not a memmap
        Path(str(s.filename)).name if isinstance(s, np.memmap) else "" for s in order.tokens.shards
    ]
    width = max(map(len, shard_names))
    yield f"{'row':>9} {'rank':>4} {'stream':>6}  {'shard':<{width}} {'token':>11} {'tokens':>6} {'document':>8}  text"
    for n in rows:
        stream = order.epoch(epoch).streams[n % order.num_streams]
        for start, stop in order.epoch(epoch).row(n):
            for i, first, end in order.tokens.ranges(start, stop):
                shard = np.asarray(order.tokens.shards[i])
                if i not in document_starts:
                    document_starts[i] = np.flatnonzero(shard == dataset.eot_id)
                document = np.searchsorted(document_starts[i], first, side="right")
                text = "".join(c if c.isprintable() else " " for c in tokenizer.decode(shard[first:end].tolist()))
                yield (
                    f"{n:>9} {n % num_ranks:>4} {stream:>6}  {shard_names[i]:<{width}} {first:>11} "
                    f"{end - first:>6} {document:>8}  {text[:max_chars]}"
                )


@dataclass(frozen=True, kw_only=True)
class InspectArgs:
    """The command line: each field is a flag, and its comment is the help."""

    run: RunArgument  # run directory (out/NAME); its dataset must be at the same path as during training
    step: Annotated[int, metavar("STEP")]  # optimizer step, counted from 0 as in log.csv
    ranks: Positive = 1  # number of ranks of the run, to show which rank read each row
    chars: Annotated[NonNegative, metavar("CHARACTERS")] = 200  # maximum length of the text on each line


def main() -> None:
    args = parse_arguments(InspectArgs, "python -m tools.inspect_step", __doc__)
    dataset, order, rows = read_run(args.run, args.step)
    start = position_of_step(args.step, rows, order)
    step_rows = range(start.n, start.n + rows[args.step])
    print(f"step {args.step}: epoch {start.epoch}, rows {step_rows[0]} to {step_rows[-1]} of {order.rows_per_epoch}")
    for line in describe_rows(dataset, order, start.epoch, step_rows, args.ranks, args.chars):
        print(line)


if __name__ == "__main__":
    run(main)
