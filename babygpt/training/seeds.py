"""Random numbers from (seed, step, rank) or (seed, epoch), so that checkpoints need no RNG state."""

import hashlib

import numpy as np


def derive_seed(*numbers: int) -> int:
    """Return a 63-bit seed, a hash of `numbers`."""
    digest = hashlib.blake2b(" ".join(map(str, numbers)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def permutation(count: int, *numbers: int) -> np.ndarray:
    """Return a permutation of 0 ... count - 1, (count,) int64, that depends only on `numbers`, not on the machine."""
    prefix = " ".join(map(str, numbers))
    keys = [hashlib.blake2b(f"{prefix} {i}".encode(), digest_size=16).digest() for i in range(count)]
    return np.array(sorted(range(count), key=keys.__getitem__), np.int64)
