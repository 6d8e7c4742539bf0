"""train.py with a fault: FAULT="kind rank step" strikes that rank in its so-manieth update, at torchrun's first try.

full    from here on no file can grow beyond 20 kB, as on a disk that is full
nan     a weight is not a number, on this rank alone
flip    a weight is another, on this rank alone
kill    the process ends by SIGKILL
hang    it sleeps for 15 s
stop    it is told to stop
memory  the device is out of memory
"""

import os
import resource
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import train
from errors import run

KIND, RANK, STEP = os.environ["FAULT"].split()
step_of, calls = train.train_step, []


def strike(weight: torch.Tensor) -> None:
    if KIND == "full":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    elif KIND == "nan":
        weight[0, 0] = float("nan")
    elif KIND == "flip":
        weight[0, 0] += 1e-3
    elif KIND == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif KIND == "stop":
        os.kill(os.getpid(), signal.SIGTERM)
    elif KIND == "hang":
        time.sleep(15)
    elif KIND == "memory":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore words.")


def faulty_step(model, optimizers, data, config, ranks, *rest, **named):
    calls.append(0)
    if (ranks.rank, len(calls) - 1) == (int(RANK), int(STEP)) and os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0":
        with torch.no_grad():
            strike(next(model.parameters()))
    return step_of(model, optimizers, data, config, ranks, *rest, **named)


train.train_step = faulty_step

if __name__ == "__main__":
    run(train.main)
