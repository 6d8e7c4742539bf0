"""train.py, with every rank writing down the rows of each step: out/<run>/trace_<rank>.json."""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import train
from errors import run

steps: list[list[list[int]]] = []
original = train.train_step


def traced(model, optimizer, data, *rest, **named):
    steps.append([row.tolist() for batch in data.micro_batches for row in batch])
    return original(model, optimizer, data, *rest, **named)


def main() -> None:
    train.main()
    out = Path(sys.argv[sys.argv.index("--general.out-dir") + 1])
    (out / f"trace_{os.environ['RANK']}.json").write_text(json.dumps(steps))


if __name__ == "__main__":
    train.train_step = traced
    run(main)
