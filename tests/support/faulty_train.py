"""Run train.py with one injected fault: FAULT="kind rank step" injects it on that rank before that update.

`step` counts the updates of this process from 0. After a restart by torchrun, no fault is injected. The kinds:

disk_full       from now on, no file can grow beyond 20 kB
nan_weight      a weight becomes NaN
nan_gradient    a gradient becomes NaN; the loss stays finite
changed_weight  a weight changes
sigkill         the process receives SIGKILL; if torchrun restarts it, it starts 3 s late
hang            the process sleeps for 15 s
record_rows     no fault; every rank records the rows of each step in out/<run>/rows_<rank>.jsonl
sigterm         the process receives SIGTERM; rows are recorded too
sigterm_in_validation  the process receives SIGTERM during the next validation
out_of_memory   the device runs out of memory
read_only       the run directory becomes read-only
deleted         the run directory is deleted
"""

import json
import os
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

import train
from babygpt.errors import run
from babygpt.training import metrics

KIND, RANK, STEP = os.environ["FAULT"].split()
FIRST_ATTEMPT = os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"
original_train_step, original_set_up = train.train_step, train.set_up
num_updates, out_dir = 0, Path()


def inject_fault(weight: torch.Tensor) -> None:
    if KIND == "disk_full":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    elif KIND == "nan_weight":
        weight[0, 0] = float("nan")
    elif KIND == "nan_gradient":
        weight.register_hook(lambda gradient: gradient * float("nan"))
    elif KIND == "changed_weight":
        weight[0, 0] += 1e-3
    elif KIND == "sigkill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif KIND == "sigterm":
        os.kill(os.getpid(), signal.SIGTERM)
    elif KIND == "hang":
        time.sleep(15)
    elif KIND == "sigterm_in_validation":
        validation_batches = train.validation_batches

        def with_sigterm(*args):
            for i, batch in enumerate(validation_batches(*args)):
                if i == 1:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield batch
                assert i < 1, "validation continued after SIGTERM"

        train.validation_batches = with_sigterm
    elif KIND == "read_only":
        for directory in (out_dir, out_dir / "checkpoints"):
            directory.chmod(0o555)
        if os.geteuid() == 0:
            os.seteuid(65534)  # permissions do not restrict root
    elif KIND == "deleted":
        shutil.rmtree(out_dir)
    elif KIND == "out_of_memory":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore words.")


def train_step(state, batch, *args, **kwargs):
    global num_updates
    rank = state.ranks.rank
    if KIND in ("record_rows", "sigterm"):
        rows = [row.tolist() for micro_batch in batch.micro_batches for row in micro_batch]
        with open(out_dir / f"rows_{rank}.jsonl", "a") as file:
            file.write(json.dumps([batch.start.epoch, batch.start.n, rows]) + "\n")
    num_updates += 1
    if (rank, num_updates - 1) == (int(RANK), int(STEP)) and FIRST_ATTEMPT:
        with torch.no_grad():
            inject_fault(next(state.model.parameters()))
    return original_train_step(state, batch, *args, **kwargs)


def set_up(objective, *args):
    global out_dir
    out_dir = Path(objective.config.general.out_dir)
    return original_set_up(objective, *args)


train.train_step, train.set_up = train_step, set_up
if KIND not in ("deleted", "read_only", "disk_full"):  # with these, plot.png is one of the files that cannot be written
    metrics.plot = lambda runs, out: None  # drawing it would take most of the time

if __name__ == "__main__":
    if KIND == "sigkill" and os.environ["RANK"] == RANK and not FIRST_ATTEMPT:
        time.sleep(3)
    run(train.main)
