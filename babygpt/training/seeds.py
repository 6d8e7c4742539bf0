"""Derive the seed of each step from (seed, step, rank), so that checkpoints need no RNG state."""

import hashlib


def derive_seed(*numbers: int) -> int:
    """Return a 63-bit seed, a hash of `numbers`."""
    digest = hashlib.blake2b(" ".join(map(str, numbers)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
