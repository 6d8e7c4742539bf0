"""tools.inspect_step: the rows that an optimizer step of a run read."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from support.helpers import EOT, call, make_tokens
from support.runs import copy_killed_run, flags

import fineweb
import train
from babygpt.data.shards import HEADER_BYTES, open_dataset
from babygpt.data.tokenizer import load_tokenizer
from babygpt.errors import UserError
from dataloader import Order, Position
from tools import inspect_step
from tools.inspect_step import position_of_step


@pytest.fixture(scope="module")
def sharded(dataset, tmp_path_factory) -> Path:
    """The small dataset in several shards."""
    directory, source = tmp_path_factory.mktemp("data") / "sharded", dataset.parent
    call(
        fineweb.main, "files", "--input", source / "texts.jsonl", "--tokenizer", source / "bpe.json",
        "--out-dir", directory, "--val-tokens", 300, "--workers", 1, "--shard-tokens", 500,
    )  # fmt: skip
    return directory


@pytest.fixture(scope="module")
def resumed_run(sharded, tmp_path_factory) -> tuple[Path, list[list[list[int]]]]:
    """A run of three epochs that was resumed at step 5 with half the batch size, and the rows of each step."""
    out, rows_by_step, train_step = tmp_path_factory.mktemp("runs") / "resumed", [], train.train_step

    def recording_train_step(state, batch, *args, **kwargs):
        rows_by_step.append([row.tolist() for micro_batch in batch.micro_batches for row in micro_batch])
        return train_step(state, batch, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_step", recording_train_step)
        settings = {f"{section}__every_n_steps": 0 for section in ("validation", "sampling")}
        call(train.main, *flags(sharded, out, training__max_steps=5, **settings))
        settings |= {"general__init_from": "resume", "training__batch_tokens": 128, "training__max_steps": 30}
        call(train.main, *flags(sharded, out, **settings))
    assert [len(step) for step in rows_by_step] == [16] * 5 + [8] * 25
    return out, rows_by_step


def inspect(run: Path, step: int, capsys: pytest.CaptureFixture, *options: object) -> tuple[str, list[re.Match]]:
    """Return the first line of the output, and the cells of each line of its table."""
    capsys.readouterr()
    call(inspect_step.main, run, "--step", step, *options)
    summary, _, *lines = capsys.readouterr().out.splitlines()
    cells = r" *(?P<row>\d+) +(?P<rank>\d+) +(?P<stream>\d+)  (?P<shard>\S+) +(?P<token>\d+) +(?P<tokens>\d+) +"
    return summary, [re.fullmatch(cells + r"(?P<document>\d+)  (?P<text>.*)", line) for line in lines]


def test_past_steps_show_the_tokens_they_read(resumed_run, sharded, capsys):
    """For every step of a run, the printed rows, shards and tokens are those that training read."""
    run, rows_by_step = resumed_run
    parts = 0
    for step, expected in enumerate(rows_by_step):
        _, lines = inspect(run, step, capsys)
        rows: dict[int, list[int]] = {}
        _, order, rows_by_count = inspect_step.read_run(run, step)
        epoch = position_of_step(step, rows_by_count, order).epoch
        for line in lines:
            ids = np.fromfile(sharded / line["shard"], np.uint16, offset=HEADER_BYTES)
            first, stop = int(line["token"]), int(line["token"]) + int(line["tokens"])
            assert stop <= len(ids)
            rows.setdefault(int(line["row"]), []).extend(ids[first:stop].tolist())
            assert int(line["stream"]) == order.epoch(epoch).streams[int(line["row"]) % 4]
        assert list(rows) == list(range(min(rows), min(rows) + len(expected)))
        assert list(rows.values()) == expected
        parts += len(lines)
    assert parts > sum(map(len, rows_by_step)), "some rows cross the end of a chunk or a shard"


def test_past_steps_show_epoch_rank_document_text(resumed_run, sharded, capsys):
    """The printed epoch, rank, document and text agree with the dataset."""
    run, _ = resumed_run
    opened = open_dataset(sharded)
    tokenizer, shards = load_tokenizer(opened.tokenizer), {Path(s.filename).name: s for s in opened.train.shards}
    summaries = [inspect(run, step, capsys)[0] for step in (0, 10, 11, 26, 27)]
    assert [summary.split(":")[1].split(" of")[0] for summary in summaries] == [
        " epoch 0, rows 0 to 15", " epoch 0, rows 120 to 127", " epoch 1, rows 0 to 7", " epoch 1, rows 120 to 127",
        " epoch 2, rows 0 to 7",
    ]  # fmt: skip
    lines = [line for step in range(12) for line in inspect(run, step, capsys, "--ranks", 4, "--chars", 9)[1]]
    cases = set()
    for line in lines:
        assert int(line["rank"]) == int(line["row"]) % 4
        ids, first, count = shards[line["shard"]], int(line["token"]), int(line["tokens"])
        assert int(line["document"]) == np.count_nonzero(ids[: first + 1] == opened.eot_id)
        assert line["text"] == tokenizer.decode(ids[first : first + count].tolist()).replace("\n", " ")[:9]
        cases.add((line["document"] == "0", bool(ids[first] == opened.eot_id)))
    assert cases >= {(True, False), (False, True), (False, False)}, (
        "a document of the previous shard, the start of a document, and the middle of one"
    )


def test_future_steps_use_the_batch_size_of_the_settings(resumed_run, tmp_path, capsys):
    """Steps that are not in the log have the batch size of config.json."""
    run, _ = resumed_run
    lines = (run / "log.csv").read_text().splitlines(keepends=True)
    for logged, row in ((20, 72), (5, 80)):  # at 5, the first launch has finished and the resumed one has no log yet
        stopped = copy_killed_run(run, logged, tmp_path / str(logged))
        (stopped / "log.csv").write_text("".join(lines[: 1 + logged]))
        (_, first), (_, later) = (inspect(stopped, step, capsys) for step in (logged, 25))
        assert int(first[0]["row"]) == row
        assert int(later[0]["row"]) == 112


def test_position_of_step_counts_rows_and_starts_epochs():
    """Each step advances by its own number of rows, and a step that does not fit into an epoch starts the next one."""
    order = Order(make_tokens(16 * 20 + 1, 60, np.random.default_rng(5)), EOT, 16, 4, seed=3)
    assert order.rows_per_epoch == 20
    rows = [6, 6, 9, 2, 10, 20, 1]
    starts = [position_of_step(step, rows, order) for step in range(len(rows))]
    assert starts == [
        Position(0, 0), Position(0, 6), Position(1, 0), Position(1, 9), Position(2, 0), Position(3, 0), Position(4, 0)
    ]  # fmt: skip


def test_unknown_steps_and_other_data_are_user_errors(resumed_run, sharded, tmp_path, capsys):
    """A missing run, a step out of range, a missing or changed dataset, and an incomplete log each give an error that "
    "names the cause."""

    def copy(name: str, without: str = "", **sections: dict) -> Path:
        path = tmp_path / name
        shutil.copytree(resumed_run[0], path, ignore=shutil.ignore_patterns(without))
        config = json.loads((path / "config.json").read_text())
        for section, fields in sections.items():
            config[section] = config.get(section, {}) | fields
        (path / "config.json").write_text(json.dumps(config))
        return path

    other = tmp_path / "other"
    shutil.copytree(sharded, other)
    shard = next(other.glob("*_train_*.bin"))
    manifest = json.loads((other / "dataset.json").read_text())
    for entry in manifest["shards"]:
        entry["sha256"] = entry["sha256"][::-1] if entry["file"] == shard.name else entry["sha256"]
    (other / "dataset.json").write_text(json.dumps(manifest))
    incomplete = copy("incomplete")
    lines = (incomplete / "log.csv").read_text().splitlines(keepends=True)
    (incomplete / "log.csv").write_text("".join([lines[0], *lines[3:]]))
    for run, step, message in (
        (tmp_path / "none", 3, "There is no run at .*none"),
        (resumed_run[0], -1, "--step -1 is out of range: .* has steps 0 to 29"),
        (resumed_run[0], 30, "--step 30 is out of range: .* has steps 0 to 29"),
        (copy("gone", data={"dataset": str(tmp_path / "away")}), 3, "dataset of .*gone is not at .*away"),
        (copy("wrong", data={"dataset": str(other)}), 3, "other is not the dataset that .*wrong was trained on"),
        (copy("chat", chat={"method": "sft"}), 3, "is a run of finetune.py, which this tool does not support"),
        (incomplete, 3, "is missing some steps, so"),
    ):
        with pytest.raises(UserError, match=message):
            call(inspect_step.main, run, "--step", step)
    for option in (("--ranks", 0), ("--chars", -1)):
        with pytest.raises(UserError, match="is out of range"):
            call(inspect_step.main, resumed_run[0], "--step", 3, *option)
    # without a checkpoint, there is no fingerprint to compare
    call(inspect_step.main, copy("unsaved", "checkpoints", data={"dataset": str(other)}), "--step", 3)
