"""The rendezvous of the ranks, also after torchrun has restarted them."""

import time
import uuid
from datetime import timedelta

import torch.distributed as dist


def rendezvous(rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """Return an empty store for `init_process_group`, shared by all ranks of this launch.

    torchrun keeps one store across its restarts. It still contains the addresses of processes that have exited, and a
    rank that connects to one of those hangs (pytorch/pytorch#135712). Rank 0 therefore generates a key prefix for this
    launch. Each process of another rank publishes a unique id and waits for the prefix under this id; rank 0 returns
    once every rank has acknowledged the prefix.
    """
    store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    if rank > 0:
        process_id = uuid.uuid4().hex
        store.set(f"process of rank {rank}", process_id)
        prefix = store.get(f"prefix for {process_id}").decode()
        store.set(f"{prefix} acknowledged by {rank}", "")
        return dist.PrefixStore(prefix, store)
    prefix, deadline = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    missing = set(range(1, world_size))
    while missing:
        for other in missing:
            if store.check([f"process of rank {other}"]):
                process_id = store.get(f"process of rank {other}").decode()
                store.set(f"prefix for {process_id}", prefix)
        missing = {other for other in missing if not store.check([f"{prefix} acknowledged by {other}"])}
        if time.monotonic() > deadline:
            raise RuntimeError(f"c10d timed out: rank {min(missing)} did not join the rendezvous")
        time.sleep(0.01)
    return dist.PrefixStore(prefix, store)
