"""How the ranks of a run find each other, also after torchrun has restarted them."""

import time
import uuid
from datetime import timedelta

import torch.distributed as dist


def rendezvous(rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """Where the ranks leave word for each other until they are joined, empty.

    torchrun keeps one store over its restarts, in which the addresses of ended processes still stand, and who reads
    those never joins (pytorch/pytorch#135712). So rank 0 makes up a name for this start and tells it to every process
    that calls by a name of its own, until all have confirmed it.
    """
    store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    if rank > 0:
        caller = uuid.uuid4().hex
        store.set(f"caller {rank}", caller)
        start = store.get(f"start for {caller}").decode()
        store.set(f"{start} confirmed by {rank}", "")
        return dist.PrefixStore(start, store)
    start, end = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    missing = set(range(1, world_size))
    while missing:
        for other in missing:
            if store.check([f"caller {other}"]):
                store.set(f"start for {store.get(f'caller {other}').decode()}", start)
        missing = {other for other in missing if not store.check([f"{start} confirmed by {other}"])}
        if time.monotonic() > end:
            raise RuntimeError(f"c10d timed out: rank {min(missing)} did not come")
        time.sleep(0.01)
    return dist.PrefixStore(start, store)
