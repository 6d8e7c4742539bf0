"""The data order: every token once per epoch, the same rows on any machine, no row skipped or repeated on resume."""

import hashlib
import itertools
import threading
from collections import Counter

import numpy as np
import pytest
import torch
from support.helpers import EOT, make_tokens

from babygpt.data.shards import Tokens
from babygpt.errors import ConfigError
from babygpt.nn.cross_entropy import IGNORE_INDEX
from dataloader import (
    WINDOW,
    DataLoader,
    Epoch,
    Order,
    Position,
    default_num_streams,
    find_chunk_starts,
    inputs_and_targets,
    permutation,
    validation_batches,
    validation_rows,
)


def rows_of_steps(
    order: Order, position: Position, rows_per_step: int, micro_batch_size: int, world_size: int, steps: int
) -> list[list[tuple]]:
    """Return the rows of each step, of all ranks, sorted by rank and micro-batch."""
    rows: list[list[tuple]] = [[] for _ in range(steps)]
    for rank in range(world_size):
        loader = DataLoader(order, position, rows_per_step, micro_batch_size, rank, world_size)
        for step in range(steps):
            batches = next(loader).micro_batches
            assert all(batch.shape == (micro_batch_size, order.block_size + 1) for batch in batches)
            rows[step] += [tuple(row.tolist()) for batch in batches for row in batch]
        loader.close()
    return rows


def test_epoch_reads_every_token_once():
    """Each token of the streams is an input once and a target once, and each row of a step belongs to one rank."""
    rng = np.random.default_rng(0)
    trials = 0
    while trials < 800:
        N, T, S = int(rng.integers(2, 3000)), int(rng.integers(1, 40)), int(rng.integers(1, 9))
        W = int(rng.integers(1, 5))
        R = W * int(rng.integers(1, 9))
        tokens = make_tokens(N, float(rng.integers(2, 200)), rng)
        order = Order(tokens, EOT, T, S, seed=trials, chunk_tokens=int(rng.integers(1, N + 1)))
        K = (N - 1) // (S * T)
        assert order.rows_per_epoch == K * S
        if K * S < R:
            continue
        trials += 1
        epoch = order.epoch(int(rng.integers(0, 3)))
        shuffled = np.concatenate([np.arange(a, b) for a, b in epoch.chunks])
        assert np.array_equal(np.sort(shuffled), np.arange(N)), "the shuffled data is a permutation of the data"
        rows = []
        for n in range(K * S):
            rows.append(np.concatenate([np.arange(a, b) for a, b in epoch.row(n)]))
            assert len(rows[-1]) == T + 1
        assert Counter(np.concatenate([row[:-1] for row in rows]).tolist()) == Counter(shuffled[: K * S * T].tolist())
        assert Counter(np.concatenate([row[1:] for row in rows]).tolist()) == Counter(
            shuffled[1 : K * S * T + 1].tolist()
        )
        steps = K * S // R
        assert N - steps * R * T < (R + S) * T, "an epoch leaves fewer than (R + S) T tokens unread"
        rows_of_ranks = [[n for n in range(steps * R) if n % W == r] for r in range(W)]
        assert sorted(itertools.chain(*rows_of_ranks)) == list(range(steps * R)), "each row belongs to one rank"


def test_read_rows_equals_rows_of_epoch(monkeypatch):
    """`Order.read_rows` calls `read_row` only for rows that cross a boundary of chunks or shards."""
    rng = np.random.default_rng(7)
    kinds, read_alone, read_row = Counter(), [], Order.read_row
    monkeypatch.setattr(Order, "read_row", lambda self, *rest: (read_alone.append(rest[1]), read_row(self, *rest)))
    for trial in range(300):
        N, T, S = int(rng.integers(50, 3000)), int(rng.integers(1, 40)), int(rng.integers(1, 9))
        tokens = make_tokens(N, float(rng.integers(2, 200)), rng, num_shards=int(rng.integers(1, 40)))
        order = Order(tokens, EOT, T, S, seed=trial, chunk_tokens=int(rng.integers(T, N + 1)))
        order.tokens = Tokens(np.split(np.arange(N), tokens.starts[1:-1]))  # each token is its own position
        epoch = order.epoch(1)
        if epoch.num_rows == 0:
            continue
        rows = rng.permutation(epoch.num_rows)[: int(rng.integers(1, 65))].tolist()
        out = np.full((len(rows), T + 1), -1)
        order.read_rows(1, rows, out)
        boundaries, crossing = set(tokens.starts.tolist()), []
        for n, row in zip(rows, out, strict=True):
            ranges = epoch.row(n)
            assert row.tolist() == [i for start, stop in ranges for i in range(start, stop)]
            kind = len(ranges) > 1, any(boundaries & set(range(start + 1, stop)) for start, stop in ranges)
            kinds[kind] += 1
            crossing += [n] if any(kind) else []
        assert read_alone == crossing, "no other row is read by read_row"
        read_alone.clear()
    assert min(kinds[chunks, shards] for chunks in (0, 1) for shards in (0, 1)) > 100, "every kind of row occurs"


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_rows_of_steps_do_not_depend_on_ranks_or_micro_batch(world_size):
    order = Order(make_tokens(20_000, 60, np.random.default_rng(1)), EOT, 16, 8, seed=3)
    expected = rows_of_steps(order, Position(), 48, 48, 1, steps=60)
    assert len({row for step in expected[:25] for row in step}) == 25 * 48, (
        "25 steps are an epoch, which has no row twice"
    )
    for micro_batch_size in (1, 2, 4):
        rows = rows_of_steps(order, Position(), 48, micro_batch_size, world_size, steps=60)
        assert [sorted(step) for step in rows] == [sorted(step) for step in expected]


def test_rank_reads_its_streams_from_start_to_end():
    """If the number of ranks divides the number of streams, each rank reads the same streams in every step."""
    order = Order(make_tokens(9000, 60, np.random.default_rng(1)), EOT, 16, 8, seed=3)
    K = order.rows_per_epoch // 8
    loader = DataLoader(order, Position(), 8, 2, rank=1, world_size=4)
    shuffled = np.concatenate([np.arange(a, b) for a, b in order.epoch(0).chunks])
    for step in range(3):
        rows = torch.cat(next(loader).micro_batches)
        for row, stream in zip(rows, order.epoch(0).streams[[1, 5]], strict=True):
            start = (stream * K + step) * 16
            ids = [int(order.tokens.read(i, i + 1)[0]) for i in shuffled[start : start + 17]]
            assert row.tolist() == ids
    loader.close()


def test_two_epochs_have_different_orders():
    """The order follows from the seed and the epoch."""
    tokens = make_tokens(20_000, 60, np.random.default_rng(1))
    first, again, other = (Order(tokens, EOT, 16, 8, seed) for seed in (3, 3, 4))
    assert np.array_equal(first.epoch(0).chunks, again.epoch(0).chunks)
    assert not np.array_equal(first.epoch(0).chunks, first.epoch(1).chunks)
    assert not np.array_equal(first.epoch(0).chunks, other.epoch(0).chunks)
    assert not np.array_equal(first.epoch(0).chunks[:, 0], np.sort(first.epoch(0).chunks[:, 0])), (
        "the chunks are shuffled"
    )


def test_streams_are_taken_in_a_seeded_order():
    """Neighboring streams often contain the same long document, so a step should not take its rows from neighbors."""
    order = Order(make_tokens(20_000, 60, np.random.default_rng(1)), EOT, 16, 64, seed=3)
    first, second = (order.epoch(epoch).streams.tolist() for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(64))
    assert first != second
    assert sum(abs(a - b) == 1 for a, b in itertools.pairwise(first)) < 8
    starts = order.epoch(0).row_start(np.arange(64))
    assert starts.tolist() == [stream * order.epoch(0).rows_per_stream * 16 for stream in first]


@pytest.mark.parametrize(("version", "expected"), [(1, "0e7cb1428b5cd0b4"), (2, "7cffbce513d3c44d")])
def test_rows_equal_recorded_values(version, expected):
    """If this fails, no run of an earlier version can be resumed or replayed."""
    positions = np.arange(20_000)
    tokens = Tokens([np.where(positions % 37 == 0, 0, positions % 251 + 1).astype(np.uint16)])
    order = Order(tokens, 0, 16, 8, seed=3, version=version)
    rows = np.zeros((order.rows_per_epoch, 17), np.int64)
    order.read_rows(1, range(len(rows)), rows)
    assert rows.shape == (1248, 17)
    assert hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest()[:16] == expected


def test_permutation_equals_recorded_values():
    """If this fails, no run of an earlier version can be resumed or replayed."""
    assert permutation(10, 1337, 0).tolist() == [6, 8, 4, 5, 7, 0, 9, 3, 2, 1]
    assert permutation(10, 1337, 1).tolist() == [5, 3, 6, 8, 4, 1, 2, 0, 7, 9]


def test_chunks_start_at_the_eot_nearest_to_each_cursor():
    rng = np.random.default_rng(2)
    for _ in range(60):
        N = int(rng.integers(2, 400_000))
        chunk = int(rng.integers(max(1, N // 50), N + 2))
        tokens = make_tokens(N, float(rng.choice([5, 3000, 60_000, 10**9])), rng)
        starts, without_eot = find_chunk_starts(tokens, EOT, chunk)
        eots = np.flatnonzero(tokens.read(0, N) == EOT)
        expected, expected_without_eot = {0}, 0
        for cursor in range(chunk, N, chunk):
            distance = np.abs(eots - cursor)
            if distance.min() <= max(WINDOW, chunk):
                expected.add(int(eots[distance.argmin()]))
            else:
                expected.add(cursor)
                expected_without_eot += 1
        assert starts.tolist() == sorted(expected)
        assert without_eot == expected_without_eot


def test_chunk_starts_of_files_equal_those_of_arrays(tmp_path):
    """`find_chunk_starts` reads memory-mapped shards through their files."""
    rng = np.random.default_rng(4)
    for trial in range(8):
        tokens = make_tokens(100_000, float(rng.choice([50, 3000, 30_000])), rng, num_shards=int(rng.integers(1, 30)))
        files = []
        for i, shard in enumerate(tokens.shards):
            path = tmp_path / f"{trial}_{i}"
            path.write_bytes(b"x" * 1024 + shard.astype(np.uint16).tobytes())
            files.append(np.memmap(path, np.uint16, "r", offset=1024, shape=shard.shape) if len(shard) else shard)
        arrays = Tokens([shard.astype(np.uint16) for shard in tokens.shards])
        for chunk in (700, 9000, 60_000):
            starts, without_eot = find_chunk_starts(Tokens(files), EOT, chunk)
            expected_starts, expected_without_eot = find_chunk_starts(arrays, EOT, chunk)
            assert (starts.tolist(), without_eot) == (expected_starts.tolist(), expected_without_eot)


def test_chunk_starts_at_the_earlier_of_two_equally_near_eots():
    ids = np.ones(100, np.uint16)
    ids[[0, 40, 60]] = EOT
    assert find_chunk_starts(Tokens([ids]), EOT, 50)[0].tolist() == [0, 40]


def test_no_step_straddles_the_end_of_an_epoch():
    order = Order(make_tokens(2000, 60, np.random.default_rng(5)), EOT, 16, 4, seed=3)
    loader = DataLoader(order, Position(), rows_per_step=10, micro_batch_size=5)
    per_epoch = order.rows_per_epoch // 10
    starts = [next(loader).start for _ in range(3 * per_epoch)]
    loader.close()
    assert order.rows_per_epoch % 10, "the last rows of an epoch are too few for a step"
    assert starts == [Position(e, 10 * i) for e in range(3) for i in range(per_epoch)]


def test_resume_at_any_step_reads_the_rows_that_follow():
    order = Order(make_tokens(2000, 60, np.random.default_rng(5)), EOT, 16, 4, seed=3)
    loader = DataLoader(order, Position(), 10, 5)
    batches = [next(loader) for _ in range(30)]
    loader.close()
    for i in range(1, 29):
        resumed = DataLoader(order, batches[i - 1].end, 10, 2)
        batch = next(resumed)
        resumed.close()
        assert batch.start == batches[i].start
        assert torch.equal(torch.cat(batch.micro_batches), torch.cat(batches[i].micro_batches))


def test_resume_with_another_batch_size_reads_every_row_once():
    order = Order(make_tokens(4000, 60, np.random.default_rng(5)), EOT, 16, 4, seed=3)
    expected = rows_of_steps(order, Position(), 12, 12, 1, steps=4)
    before = rows_of_steps(order, Position(), 12, 12, 1, steps=2)
    after = rows_of_steps(order, Position(0, 24), 6, 3, 2, steps=4)
    assert sorted(row for step in before + after for row in step) == sorted(row for step in expected for row in step)


def test_targets_are_the_inputs_shifted_by_one():
    rows = torch.arange(12).view(2, 6)
    idx, targets = inputs_and_targets(rows, torch.device("cpu"))
    assert idx.tolist() == [[0, 1, 2, 3, 4], [6, 7, 8, 9, 10]]
    assert targets.tolist() == [[1, 2, 3, 4, 5], [7, 8, 9, 10, 11]]


@pytest.mark.parametrize(
    ("num_tokens", "block_size", "expected"),
    [(10**10, 1024, 4096), (50_000_000, 256, 4096), (1_000_000, 64, 256), (300_000, 256, 32), (1000, 256, 1)],
)
def test_default_streams_have_at_least_32_rows(num_tokens, block_size, expected):
    """A power of two, at most 4,096; a dataset of less than 64 rows has one stream."""
    assert default_num_streams(num_tokens, block_size) == expected
    assert expected == 1 or num_tokens // block_size // expected >= 32
    tokens = make_tokens(3000, 20, np.random.default_rng(0))
    assert Order(tokens, EOT, 8, None, seed=0).num_streams == default_num_streams(len(tokens), 8)


def test_default_chunks_of_one_document_end_anywhere_in_a_row():
    """A chunk of one long document ends in the middle of it, so its last target is a token of another chunk.

    If such targets were all at the same position of a row, the model would learn to predict a random token there.
    """
    T = 16
    order = Order(make_tokens(40_000, 1e9, np.random.default_rng(0)), EOT, T, num_streams=256, seed=0)
    rows = np.empty((order.rows_per_epoch, T + 1), np.int64)
    order.read_rows(0, range(len(rows)), rows)
    follows = rows[:, 1:] == rows[:, :-1] + 1
    assert (~follows).mean(axis=0).max() < 0.03


def test_data_smaller_than_one_step_is_rejected():
    order = Order(make_tokens(500, 60, np.random.default_rng(5)), EOT, 16, 4, seed=3)
    with pytest.raises(ConfigError, match=r"500 training tokens give 28 rows of 16 tokens in 4 streams.* takes 29"):
        DataLoader(order, Position(), 29, 1)


@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(1, 4), (2, 3), (3, 5), (4, 1)])
def test_validation_tokens_do_not_depend_on_the_ranks(world_size, micro_batch_size, monkeypatch):
    monkeypatch.setattr("dataloader.VAL_TOKENS", 16 * 37)
    tokens = make_tokens(16 * 50, 60, np.random.default_rng(6))
    ids = tokens.read(0, len(tokens))
    all_targets = []
    for rank in range(world_size):
        for idx, targets in validation_batches(tokens, 16, micro_batch_size, rank, world_size):
            assert idx.shape == targets.shape == (micro_batch_size, 16)
            counted = targets[:, 0] != IGNORE_INDEX
            assert torch.equal(idx[counted][:, 1:], targets[counted][:, :-1])
            assert (targets[~counted] == IGNORE_INDEX).all()
            all_targets += targets[counted].flatten().tolist()
    assert validation_rows(tokens, 16) == 37
    assert sorted(all_targets) == sorted(ids[1 : 37 * 16 + 1].tolist())


def test_error_while_reading_is_raised_in_the_training_thread():
    order = Order(make_tokens(2000, 60, np.random.default_rng(5)), EOT, 16, 4, seed=3)
    order.tokens.shards[0] = np.empty(0, np.uint16)  # as if the file had been truncated
    with pytest.raises(ValueError, match="broadcast"):
        list(DataLoader(order, Position(), 4, 2))


def test_reader_thread_pins_memory_on_its_own_gpu(monkeypatch):
    """A new thread uses device 0: without set_device, every rank would create a CUDA context on the first GPU."""
    calls, empty = [], torch.empty
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: calls.append((device, threading.current_thread().name))
    )
    monkeypatch.setattr(
        torch, "empty", lambda *a, pin_memory=False, **k: calls.append(("pinned", pin_memory)) or empty(*a, **k)
    )
    order = Order(make_tokens(2000, 60, np.random.default_rng(5)), EOT, 16, 4, seed=3)
    loader = DataLoader(order, Position(), 4, 2, device=torch.device("cuda", 3))
    next(loader)
    loader.close()
    assert calls[0] == (torch.device("cuda", 3), "dataloader")
    assert set(calls[1:]) == {("pinned", True)}


def test_close_stops_the_reader_thread():
    loader = DataLoader(Order(make_tokens(2000, 60, np.random.default_rng(5)), EOT, 16, 4, seed=3), Position(), 4, 2)
    loader.close()
    assert not loader.thread.is_alive()


def test_row_outside_the_epoch_is_rejected():
    epoch = Epoch(np.array([[0, 100]]), np.array([0, 100]), streams=np.arange(3), block_size=10)
    assert epoch.num_rows == 9
    with pytest.raises(IndexError):
        epoch.row(9)
    order = Order(make_tokens(500, 60, np.random.default_rng(5)), EOT, 16, 4, seed=3)
    for rows in ([-1, 0], [27, 28], [10**9, 0]):
        with pytest.raises(IndexError, match="28 rows"):
            order.read_rows(0, rows, np.zeros((2, 17), np.int64))
    with pytest.raises(ValueError, match="longer"):
        order.read_rows(0, [1], np.zeros((2, 17), np.int64))
