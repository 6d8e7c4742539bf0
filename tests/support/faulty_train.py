"""train.py with a fault: FAULT="kind rank step" strikes that rank in its so-manieth update, at torchrun's first try.

full    from here on no file can grow beyond 20 kB, as on a disk that is full
nan     a weight is not a number, on this rank alone
gradient  a gradient of this rank is not a number, its loss is
flip    a weight is another, on this rank alone
kill    the process ends by SIGKILL, and begins late when torchrun tries again
hang    it sleeps for 15 s
rows    nothing strikes, but every rank writes down the rows of each step: out/<run>/rows_<rank>.jsonl
stop    it is told to stop; the rows too
scene   it is told to stop in the middle of the next validation
memory  the device is out of memory
locked  from here on nothing can be written to the run's folder
gone    the run's folder is deleted
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
step_of, set_up_of, calls, OUT = train.train_step, train.set_up, [], [Path()]
FIRST_TRY = os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"


def strike(weight: torch.Tensor, out: Path) -> None:
    if KIND == "full":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    elif KIND == "nan":
        weight[0, 0] = float("nan")
    elif KIND == "gradient":
        weight.register_hook(lambda gradient: gradient * float("nan"))
    elif KIND == "flip":
        weight[0, 0] += 1e-3
    elif KIND == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif KIND == "stop":
        os.kill(os.getpid(), signal.SIGTERM)
    elif KIND == "hang":
        time.sleep(15)
    elif KIND == "scene":
        batches_of = train.validation_batches

        def told_at_the_second(*args):
            for i, batch in enumerate(batches_of(*args)):
                if i == 1:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield batch
                assert i < 1, "it went on with the validation"

        train.validation_batches = told_at_the_second
    elif KIND == "locked":
        for folder in (out, out / "checkpoints"):
            folder.chmod(0o555)
        if os.geteuid() == 0:
            os.seteuid(65534)  # root may write anywhere
    elif KIND == "gone":
        shutil.rmtree(out)
    elif KIND == "memory":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore words.")


def faulty_step(state, batch, *rest, **named):
    calls.append(0)
    rank = state.ranks.rank
    if KIND in ("rows", "stop"):
        rows = [row.tolist() for micro_batch in batch.micro_batches for row in micro_batch]
        with open(OUT[0] / f"rows_{rank}.jsonl", "a") as file:
            file.write(json.dumps([batch.start.epoch, batch.start.n, rows]) + "\n")
    if (rank, len(calls) - 1) == (int(RANK), int(STEP)) and FIRST_TRY:
        with torch.no_grad():
            strike(next(state.model.parameters()), OUT[0])
    return step_of(state, batch, *rest, **named)


def set_up(config, *rest):
    OUT[:] = [Path(config.general.out_dir)]
    return set_up_of(config, *rest)


train.train_step, train.set_up = faulty_step, set_up
if KIND not in ("gone", "locked", "full"):  # there the picture is a file that cannot be written
    metrics.plot = lambda runs, out: None  # elsewhere it would take most of the time

if __name__ == "__main__":
    if KIND == "kill" and os.environ["RANK"] == RANK and not FIRST_TRY:
        time.sleep(3)
    run(train.main)
