"""Seeds: randomness follows from (seed, step, rank), so no RNG state needs saving."""

import hashlib


def derive_seed(*numbers: int) -> int:
    """A seed from several numbers, 63 bits."""
    digest = hashlib.blake2b(" ".join(map(str, numbers)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
