"""Estimate how many rows fit in memory, and suggest what to change if memory runs out."""

import math

# conservative estimates of device memory in bfloat16; results/speed/fake-h200.md has 32 GB for 64 rows of GPT-2
ACTIVATION_BYTES = 46  # per token, layer and channel; 60 for the modern GPT
BYTES_PER_PARAMETER = 20  # weight 4, gradient 4, two moments of Adam 8, bfloat16 copy 2, rounded up
LOGITS_BYTES = 2 << 30
MAX_CPU_ROWS = 16


def max_rows(device_memory: int, num_parameters: float, row_bytes: float) -> int:
    """Return the largest power of two, at most 64, of rows whose memory is under 0.8 of `device_memory` bytes.

    On a CPU, where `device_memory` is 0, return 16.
    """
    if not device_memory:
        return MAX_CPU_ROWS
    available = 0.8 * device_memory - BYTES_PER_PARAMETER * num_parameters - LOGITS_BYTES
    return next((n for n in (64, 32, 16, 8, 4, 2) if n * row_bytes < available), 1)


def largest_divisor(rows: int, limit: int) -> int:
    """Return the largest divisor of `rows` that is at most `limit`."""
    return max(n for n in range(1, limit + 1) if rows % n == 0)


def micro_batch_warning(batch_tokens: int, block_size: int, micro_batch_size: int, world_size: int) -> str | None:
    """Return a warning if micro_batch_size is small because the number of rows has few divisors, otherwise None."""
    rows = batch_tokens // block_size // world_size  # per rank
    if micro_batch_size >= 8 or micro_batch_size == rows:
        return None
    if any(rows % n == 0 for n in range(micro_batch_size + 1, 4 * micro_batch_size + 1)):
        return None
    return (
        f"Micro-batches of {micro_batch_size} rows are slow. Each rank has {rows:,} rows per step, with no larger "
        f"divisor up to {4 * micro_batch_size}. Use a --batch-tokens with a multiple of 16 rows per rank, "
        f"such as {math.ceil(rows / 16) * 16 * world_size * block_size:,}."
    )


def memory_advice(rows: int, micro_batch_size: int, activation_checkpointing: bool) -> str:
    """Return what to change if memory runs out, the smallest change first. A rank has `rows` rows per step."""
    options = []
    smaller = [m for m in range(1, micro_batch_size) if rows % m == 0]
    if smaller:
        options.append(f"--micro-batch-size {smaller[-1]}: the same batch in more forward passes")
    if not activation_checkpointing:
        options.append("--activation-checkpointing: slower by about a third")
    options.append("a smaller --block-size, or a smaller model")
    return "\n  - ".join(["Use one of these, the smallest change first:", *options])
