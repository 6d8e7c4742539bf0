"""The order of the data: every token once, the same rows on any machine, nothing skipped at a resume."""

import threading
from collections import Counter

import numpy as np
import pytest
import torch
from support.helpers import EOT, make_tokens

from babygpt.data.shards import Tokens
from babygpt.errors import ConfigError
from babygpt.nn.cross_entropy import IGNORED
from dataloader import (
    WINDOW,
    DataLoader,
    Epoch,
    Order,
    Position,
    find_chunk_starts,
    inputs_and_targets,
    permutation,
    validation_batches,
    validation_rows,
)


def rows_of_steps(order: Order, position: Position, rows: int, micro: int, world: int, steps: int) -> list[list[tuple]]:
    """For each step the rows all ranks read, in the order of ranks and micro-batches."""
    read: list[list[tuple]] = [[] for _ in range(steps)]
    for rank in range(world):
        loader = DataLoader(order, position, rows, micro, rank, world)
        for step in range(steps):
            batches = next(loader).micro_batches
            assert all(batch.shape == (micro, order.block_size + 1) for batch in batches)
            read[step] += [tuple(row.tolist()) for batch in batches for row in batch]
        loader.close()
    return read


def test_an_epoch_reads_every_token_once_as_input_and_once_as_target():
    rng = np.random.default_rng(0)
    tried = 0
    while tried < 800:
        N, T, S = int(rng.integers(2, 3000)), int(rng.integers(1, 40)), int(rng.integers(1, 9))
        W = int(rng.integers(1, 5))
        R = W * int(rng.integers(1, 9))
        tokens = make_tokens(N, float(rng.integers(2, 200)), rng)
        order = Order(tokens, EOT, T, S, seed=tried, chunk_tokens=int(rng.integers(1, N + 1)))
        K = (N - 1) // (S * T)
        assert order.rows_per_epoch == K * S
        if K * S < R:
            continue
        tried += 1
        epoch = order.epoch(int(rng.integers(0, 3)))
        line = np.concatenate([np.arange(a, b) for a, b in epoch.chunks])
        assert np.array_equal(np.sort(line), np.arange(N)), "the line is the data, in another order"
        rows = []
        for n in range(K * S):
            rows.append(np.concatenate([np.arange(a, b) for a, b in epoch.row(n)]))
            assert len(rows[-1]) == T + 1
        assert Counter(np.concatenate([row[:-1] for row in rows]).tolist()) == Counter(line[: K * S * T].tolist())
        assert Counter(np.concatenate([row[1:] for row in rows]).tolist()) == Counter(line[1 : K * S * T + 1].tolist())
        steps = K * S // R
        assert N - steps * R * T < (R + S) * T, "what an epoch leaves unread"
        ranks = [[n for n in range(steps * R) if n % W == r] for r in range(W)]
        assert sorted(n for rows in ranks for n in rows) == list(range(steps * R)), "the ranks share a step's rows"


def test_rows_read_together_are_the_rows_read_one_by_one(monkeypatch):
    rng = np.random.default_rng(7)
    kinds, one_by_one, read_row = Counter(), [], Order.read_row
    monkeypatch.setattr(Order, "read_row", lambda self, *rest: (one_by_one.append(rest[1]), read_row(self, *rest)))
    for trial in range(300):
        N, T, S = int(rng.integers(50, 3000)), int(rng.integers(1, 40)), int(rng.integers(1, 9))
        tokens = make_tokens(N, float(rng.integers(2, 200)), rng, num_shards=int(rng.integers(1, 40)))
        order = Order(tokens, EOT, T, S, seed=trial, chunk_tokens=int(rng.integers(T, N + 1)))
        order.tokens = Tokens(np.split(np.arange(N), tokens.starts[1:-1]))  # each token tells its place
        epoch = order.epoch(1)
        if epoch.num_rows == 0:
            continue
        rows = rng.permutation(epoch.num_rows)[: int(rng.integers(1, 65))].tolist()
        out = np.full((len(rows), T + 1), -1)
        order.read_rows(1, rows, out)
        borders, crossing = set(tokens.starts.tolist()), []
        for n, row in zip(rows, out, strict=True):
            ranges = epoch.row(n)
            assert row.tolist() == [place for start, stop in ranges for place in range(start, stop)]
            kind = len(ranges) > 1, any(borders & set(range(start + 1, stop)) for start, stop in ranges)
            kinds[kind] += 1
            crossing += [n] if any(kind) else []
        assert one_by_one == crossing, "no other row takes the slow way"
        one_by_one.clear()
    assert min(kinds[chunks, shards] for chunks in (0, 1) for shards in (0, 1)) > 100, "all kinds of rows were tried"


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_a_step_has_the_same_rows_for_any_number_of_ranks_and_any_micro_batch(world):
    order = Order(make_tokens(20_000, 60, np.random.default_rng(1)), EOT, 16, 8, seed=3)
    expected = rows_of_steps(order, Position(), 48, 48, 1, steps=60)
    assert len({row for step in expected[:25] for row in step}) == 25 * 48, "no row twice in an epoch of 25 steps"
    for micro in (1, 2, 4):
        read = rows_of_steps(order, Position(), 48, micro, world, steps=60)
        assert [sorted(step) for step in read] == [sorted(step) for step in expected]


def test_a_rank_reads_its_own_streams_front_to_back_where_the_ranks_divide_the_streams():
    order = Order(make_tokens(9000, 60, np.random.default_rng(1)), EOT, 16, 8, seed=3)
    K = order.rows_per_epoch // 8
    loader = DataLoader(order, Position(), 8, 2, rank=1, world_size=4)
    line = np.concatenate([np.arange(a, b) for a, b in order.epoch(0).chunks])
    for step in range(3):
        rows = torch.cat(next(loader).micro_batches)
        for row, stream in zip(rows, (1, 5), strict=True):
            start = (stream * K + step) * 16
            ids = [int(order.tokens.read(i, i + 1)[0]) for i in line[start : start + 17]]
            assert row.tolist() == ids
    loader.close()


def test_two_epochs_have_different_orders_and_a_seed_always_the_same():
    tokens = make_tokens(20_000, 60, np.random.default_rng(1))
    first, again, other = (Order(tokens, EOT, 16, 8, seed) for seed in (3, 3, 4))
    assert np.array_equal(first.epoch(0).chunks, again.epoch(0).chunks)
    assert not np.array_equal(first.epoch(0).chunks, first.epoch(1).chunks)
    assert not np.array_equal(first.epoch(0).chunks, other.epoch(0).chunks)
    assert not np.array_equal(first.epoch(0).chunks[:, 0], np.sort(first.epoch(0).chunks[:, 0])), "shuffled at all"


def test_the_shuffle_is_the_one_that_earlier_runs_had():
    # recorded values: if this fails, no run of an earlier version can be resumed or audited
    assert permutation(10, seed=1337, epoch=0).tolist() == [6, 8, 4, 5, 7, 0, 9, 3, 2, 1]
    assert permutation(10, seed=1337, epoch=1).tolist() == [5, 3, 6, 8, 4, 1, 2, 0, 7, 9]


def test_chunks_begin_at_the_end_of_text_nearest_to_each_cursor():
    rng = np.random.default_rng(2)
    for _ in range(60):
        N = int(rng.integers(2, 400_000))
        chunk = int(rng.integers(max(1, N // 50), N + 2))
        tokens = make_tokens(N, float(rng.choice([5, 3000, 60_000, 10**9])), rng)
        cuts, forced = find_chunk_starts(tokens, EOT, chunk)
        eots = np.flatnonzero(tokens.read(0, N) == EOT)
        expected, forced_expected = {0}, 0
        for cursor in range(chunk, N, chunk):
            distance = np.abs(eots - cursor)
            if distance.min() <= max(WINDOW, chunk):
                expected.add(int(eots[distance.argmin()]))
            else:
                expected.add(cursor)
                forced_expected += 1
        assert cuts.tolist() == sorted(expected)
        assert forced == forced_expected


def test_files_are_cut_as_arrays_are(tmp_path):
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
            (cuts, forced), (cuts_2, forced_2) = (
                find_chunk_starts(Tokens(files), EOT, chunk),
                find_chunk_starts(arrays, EOT, chunk),
            )
            assert (cuts.tolist(), forced) == (cuts_2.tolist(), forced_2)


def test_of_two_ends_of_text_equally_near_the_earlier_cuts():
    ids = np.ones(100, np.uint16)
    ids[[0, 40, 60]] = EOT
    assert find_chunk_starts(Tokens([ids]), EOT, 50)[0].tolist() == [0, 40]


def test_no_step_straddles_the_end_of_an_epoch():
    order = Order(make_tokens(2000, 60, np.random.default_rng(5)), EOT, 16, 4, seed=3)
    loader = DataLoader(order, Position(), rows_per_step=10, micro_batch_size=5)
    per_epoch = order.rows_per_epoch // 10
    starts = [next(loader).start for _ in range(3 * per_epoch)]
    loader.close()
    assert order.rows_per_epoch % 10, "rows are left over"
    assert starts == [Position(e, 10 * i) for e in range(3) for i in range(per_epoch)]


def test_a_resume_at_any_step_reads_on_as_if_never_stopped():
    order = Order(make_tokens(2000, 60, np.random.default_rng(5)), EOT, 16, 4, seed=3)
    loader = DataLoader(order, Position(), 10, 5)
    steps = [next(loader) for _ in range(30)]
    loader.close()
    for i in range(1, 29):
        resumed = DataLoader(order, steps[i - 1].end, 10, 2)
        again = next(resumed)
        resumed.close()
        assert again.start == steps[i].start
        assert torch.equal(torch.cat(again.micro_batches), torch.cat(steps[i].micro_batches))


def test_rows_go_on_where_they_were_when_the_batch_changes():
    order = Order(make_tokens(4000, 60, np.random.default_rng(5)), EOT, 16, 4, seed=3)
    rows = rows_of_steps(order, Position(), 12, 12, 1, steps=4)
    first = rows_of_steps(order, Position(), 12, 12, 1, steps=2)
    then = rows_of_steps(order, Position(0, 24), 6, 3, 2, steps=4)
    assert sorted(row for step in first + then for row in step) == sorted(row for step in rows for row in step)


def test_targets_are_the_inputs_moved_by_one():
    rows = torch.arange(12).view(2, 6)
    idx, targets = inputs_and_targets(rows, torch.device("cpu"))
    assert idx.tolist() == [[0, 1, 2, 3, 4], [6, 7, 8, 9, 10]]
    assert targets.tolist() == [[1, 2, 3, 4, 5], [7, 8, 9, 10, 11]]


def test_data_too_small_for_a_step_is_refused_with_the_sizes():
    order = Order(make_tokens(500, 60, np.random.default_rng(5)), EOT, 16, 4, seed=3)
    with pytest.raises(ConfigError, match=r"500 training tokens give 28 rows of 16 tokens in 4 streams.* takes 29"):
        DataLoader(order, Position(), 29, 1)


@pytest.mark.parametrize(("world", "micro"), [(1, 4), (2, 3), (3, 5), (4, 1)])
def test_validation_reads_the_same_tokens_for_any_number_of_ranks(world, micro, monkeypatch):
    monkeypatch.setattr("dataloader.VAL_TOKENS", 16 * 37)
    tokens = make_tokens(16 * 50, 60, np.random.default_rng(6))
    ids = tokens.read(0, len(tokens))
    targets_seen = []
    for rank in range(world):
        for idx, targets in validation_batches(tokens, 16, micro, rank, world):
            assert idx.shape == targets.shape == (micro, 16)
            counted = targets[:, 0] != IGNORED
            assert torch.equal(idx[counted][:, 1:], targets[counted][:, :-1])
            assert (targets[~counted] == IGNORED).all()
            targets_seen += targets[counted].flatten().tolist()
    assert validation_rows(tokens, 16) == 37
    assert sorted(targets_seen) == sorted(ids[1 : 37 * 16 + 1].tolist())


def test_a_fault_of_the_reader_reaches_the_training_thread():
    order = Order(make_tokens(2000, 60, np.random.default_rng(5)), EOT, 16, 4, seed=3)
    order.tokens.shards[0] = np.empty(0, np.uint16)  # a file that shrank behind our back
    with pytest.raises(ValueError, match="broadcast"):
        list(DataLoader(order, Position(), 4, 2))


def test_the_thread_pins_memory_through_its_own_gpu(monkeypatch):
    """A new thread starts on device 0: without set_device, every rank would open a context on the first GPU."""
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


def test_close_ends_the_reader():
    loader = DataLoader(Order(make_tokens(2000, 60, np.random.default_rng(5)), EOT, 16, 4, seed=3), Position(), 4, 2)
    loader.close()
    assert not loader.thread.is_alive()


def test_a_row_outside_the_epoch_is_refused():
    epoch = Epoch(np.array([[0, 100]]), np.array([0, 100]), block_size=10, num_streams=3)
    assert epoch.num_rows == 9
    with pytest.raises(IndexError):
        epoch.row(9)
    order = Order(make_tokens(500, 60, np.random.default_rng(5)), EOT, 16, 4, seed=3)
    for rows in ([-1, 0], [27, 28], [10**9, 0]):
        with pytest.raises(IndexError, match="of 28"):
            order.read_rows(0, rows, np.zeros((2, 17), np.int64))
    with pytest.raises(ValueError, match="longer"):
        order.read_rows(0, [1], np.zeros((2, 17), np.int64))
