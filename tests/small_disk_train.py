"""train.py where, from its second checkpoint on, no file can grow beyond 20 kB: as on a disk that is full."""

import resource
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import checkpoint
import train
from errors import run

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
save = checkpoint.save


def save_on_a_small_disk(run, step, *rest, **named):
    if step > 4:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    return save(run, step, *rest, **named)


checkpoint.save = save_on_a_small_disk

if __name__ == "__main__":
    run(train.main)
