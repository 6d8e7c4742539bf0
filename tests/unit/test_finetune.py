"""finetune.py: SFT and DPO train on every example once, resume exactly, and log their losses and rewards."""

import json
import math
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.chat import make_base_model, save_instructions, save_preferences
from support.helpers import call, random_text, save
from support.runs import assert_bitwise_equal, copy_killed_run

import finetune
import train
from babygpt.chat import baselines, dpo, template
from babygpt.chat.conversations import DataSource, prepare, read_manifest
from babygpt.chat.template import ChatTemplate
from babygpt.chat.vocabulary import with_chat_tokens
from babygpt.errors import ConfigError, UserError
from babygpt.export.directory import write_model
from babygpt.nn.cross_entropy import IGNORE_INDEX
from babygpt.pretrained import read_pretrained
from babygpt.training import checkpoint, plots
from babygpt.training.distributed import Ranks
from babygpt.training.log import column, read_log
from dataloader import Position
from finetune import DPO, SFT, ExampleLoader, FinetuneArgs, make_objective, new_config
from model import GPT, build_model, config_from_dict
from tools import evaluate_chat, export, replay, runs
from tools.train_tokenizer import train_tokenizer

CPU = torch.device("cpu")
ALONE = Ranks(0, 0, 1, CPU)
FLAGS = ("--device", "cpu", "--dtype", "float32")


@pytest.fixture(scope="module")
def base(dataset, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("base") / "base"
    make_base_model(dataset, out)
    return out


@pytest.fixture(autouse=True)
def data_directory(tmp_path, monkeypatch):
    monkeypatch.setattr(finetune, "DATA_DIRECTORY", tmp_path / "chat")


@pytest.fixture
def instructions(tmp_path) -> Path:
    return save_instructions(tmp_path / "instructions.jsonl", 60)


@pytest.fixture
def preferences(tmp_path) -> Path:
    return save_preferences(tmp_path / "preferences.jsonl", 40)


def objective_of(method: str, base: Path, data: Path, ranks: Ranks = ALONE, **fields: object) -> SFT | DPO:
    arguments = FinetuneArgs(method=method, model=str(base), data=str(data), device="cpu", dtype="float32", **fields)
    return make_objective(new_config(arguments), ranks)


# ---------------------------------------------------------------------------------------------------------
# vocabulary


@pytest.mark.parametrize("modern", [False, True])
@pytest.mark.parametrize("vocab_size", [300, 384])
@torch.no_grad()
def test_new_tokens_start_as_the_mean_and_change_no_other(vocab_size, modern, tmp_path):
    """A full table, of 384 entries, grows by 128; the table of bigrams keeps its size, and so do its hashes."""
    train_tokenizer([random_text(seed) for seed in range(200)], vocab_size, tmp_path / "tokenizer.json", progress=False)
    model = make_base_model(tmp_path / "tokenizer.json", tmp_path / "run", modern)
    assert model.config.vocab_size == vocab_size
    grown = with_chat_tokens(read_pretrained(tmp_path / "run"))
    larger = grown.build(lambda values: build_model(config_from_dict(values))).eval()
    assert larger.config.vocab_size == grown.tokenizer.vocab_size == vocab_size + 2
    assert len(larger.wte.weight) == (384 if vocab_size == 300 else 512)
    mean = model.wte.weight[:vocab_size].mean(dim=0)
    torch.testing.assert_close(larger.wte.weight[vocab_size : vocab_size + 2], mean.expand(2, -1))
    idx = torch.randint(0, vocab_size, (2, 20))
    assert torch.equal(larger(idx)[..., :vocab_size], model(idx)[..., :vocab_size])
    out = tmp_path / "exported"
    out.mkdir()
    write_model(grown, out)
    again = GPT.from_pretrained(out)
    assert torch.equal(again(idx)[..., :vocab_size], model(idx)[..., :vocab_size])


# ---------------------------------------------------------------------------------------------------------
# SFT


def test_default_directory_has_the_name_of_the_run(base):
    newest = checkpoint.list_checkpoints(base)[-1]
    for model in (base, newest):
        args = FinetuneArgs(method="sft", model=str(model), data="instructions.jsonl")
        assert new_config(args).general.out_dir == Path("out") / f"{base.name}-sft"


def test_sft_lowers_the_held_out_loss_and_writes_a_run(base, instructions, tmp_path, capsys):
    out = tmp_path / "sft"
    call(finetune.main, "sft", base, instructions, "--out-dir", out, "--epochs", 6, "--max-lr", 1e-2, *FLAGS)
    rows = read_log(out / "log.csv")
    assert rows[-1]["val_loss"] < rows[0]["val_loss"] - 0.5
    assert {"config.json", "finished", "samples.txt", "tokenizer.json"} <= {path.name for path in out.iterdir()}
    config = json.loads((out / "config.json").read_text())
    assert (config["chat"]["method"], config["general"]["init_from"]) == ("sft", str(base))
    assert config["optimizer"]["weight_decay"] == config["optimizer"]["min_lr_ratio"] == 0
    model = GPT.from_pretrained(out)
    assert (model.config.vocab_size, model.config.dropout) == (302, 0.0)
    assert ChatTemplate(model.tokenizer).im_end_id == 301
    samples = (out / "samples.txt").read_text()
    assert "user: " in samples
    assert "assistant: " in samples
    assert "6.00 epochs" in capsys.readouterr().out


def test_each_conversation_is_read_once_per_epoch(base, instructions):
    """In another order in each epoch; the last step of an epoch takes the remaining rows."""
    objective = objective_of("sft", base, instructions, rows=3)
    loader = ExampleLoader(objective, Position(), ALONE)
    epochs: list[list[int]] = [[], []]
    positions = []
    while (batch := next(loader)).start.epoch < 2:
        rows = objective.epoch(batch.start.epoch)[batch.start.n : batch.end.n]
        epochs[batch.start.epoch] += [i for row in rows for i in row]
        positions.append((batch.start.epoch, batch.start.n))
        assert batch.num_targets == sum(
            int((micro_batch.targets != IGNORE_INDEX).sum()) for micro_batch in batch.micro_batches
        )
        assert batch.num_tokens == sum(objective.lengths[i] for row in rows for i in row)
    loader.close()
    assert sorted(epochs[0]) == sorted(epochs[1]) == objective.kept.tolist()
    assert epochs[0] != epochs[1]
    assert objective.num_examples % 3 != 0, "otherwise the last step is not special"
    assert len(positions) == 2 * math.ceil(objective.num_examples / 3)


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_ranks_share_the_examples_of_each_step(method, base, instructions, preferences):
    """The examples of a step do not depend on the number of ranks, and all have as many micro-batches."""
    data = instructions if method == "sft" else preferences
    per_step = {"rows": 3} if method == "sft" else {"pairs": 6}
    objective = objective_of(method, base, data, **per_step, micro_batch_size=2)
    objective.batch = lambda start, examples, local, pin: (  # type: ignore[method-assign]
        finetune.Batch(start, Position(start.epoch, start.n + len(examples)), local, len(examples), 0)
    )
    read: dict[int, list] = {}
    for world_size in (1, 2, 4):
        loaders = [ExampleLoader(objective, Position(), Ranks(r, r, world_size, CPU)) for r in range(world_size)]
        read[world_size] = []
        for _ in range(12):
            batches = [next(loader) for loader in loaders]
            assert len({len(batch.micro_batches) for batch in batches}) == 1
            examples = [e for batch in batches for micro_batch in batch.micro_batches for e in micro_batch]
            read[world_size].append(sorted(examples))
        for loader in loaders:
            loader.close()
    assert read[1] == read[2] == read[4]


def test_loss_is_the_mean_over_all_supervised_tokens(base, instructions, tmp_path):
    """Not a mean of means per micro-batch: their numbers of supervised tokens differ."""
    losses = []
    for size in (1, 2, 6):
        out = tmp_path / f"sft-{size}"
        flags = ("--rows", 6, "--micro-batch-size", size, "--max-steps", 3, "--max-lr", 1e-2, *FLAGS)
        call(finetune.main, "sft", base, instructions, "--out-dir", out, *flags)
        losses.append([row["loss"] for row in read_log(out / "log.csv")[:-1]])
    assert losses[0] == pytest.approx(losses[2], abs=1e-5)
    assert losses[1] == pytest.approx(losses[2], abs=1e-5)
    objective = objective_of("sft", base, instructions, rows=6)
    batch = objective.batch(Position(), objective.epoch(0)[:6], [objective.epoch(0)[:6]], False)
    packed = batch.micro_batches[0]
    model = objective.adapt(read_pretrained(base)).build(lambda values: GPT(objective.config.model)).eval()
    with torch.no_grad():
        logits = model(packed.idx, packed=packed.packed())
    expected = F.cross_entropy(logits.flatten(0, 1), packed.targets.flatten(), ignore_index=IGNORE_INDEX)
    assert losses[0][0] == pytest.approx(expected.item(), abs=1e-5)


def test_long_conversations_are_truncated_and_counted(base, tmp_path, capsys):
    """Those without a supervised token after truncation are skipped."""
    long = {"instruction": "data " * 100, "output": "lost"}
    cut = {"instruction": "Q", "output": "data " * 100}
    good = {"instruction": "Q", "output": "A"}
    records = "".join(json.dumps(record) + "\n" for record in [long, cut, good] * 4)
    path = save(tmp_path / "long.jsonl", records.encode())
    objective = objective_of("sft", base, path, held_out=0.0)
    assert "8 truncated, 4 skipped without a supervised token" in objective.summary(ALONE)
    assert len(objective.kept) == 8
    rows = objective.epoch(0)
    assert all(objective.targets[row].sum() > 0 for row in rows)
    call(finetune.main, "sft", base, path, "--out-dir", tmp_path / "run", "--held-out", 0.0, *FLAGS)
    assert all(math.isfinite(row["loss"]) for row in read_log(tmp_path / "run" / "log.csv")[:-1])
    only_long = save(tmp_path / "only.jsonl", json.dumps(long).encode())
    with pytest.raises(ConfigError, match="begins within the first 96 tokens"):
        objective_of("sft", base, only_long, held_out=0.0)


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_killed_run_resumes_bitwise(method, base, instructions, preferences, tmp_path):
    """Across the end of an epoch, and without the initial model and the source of the data."""
    model = tmp_path / "base"
    shutil.copytree(base, model)
    data = instructions if method == "sft" else preferences
    per_step = ("--rows", 4) if method == "sft" else ("--pairs", 10)
    flags = (*per_step, "--max-steps", 8, "--max-lr", 1e-3, "--save-every", 1, "--keep", 0)
    whole = tmp_path / "whole"
    call(finetune.main, method, model, data, "--out-dir", whole, "--validate-every", 3, *flags, *FLAGS)
    assert read_log(whole / "log.csv")[-2]["epoch"] > 0
    out = copy_killed_run(whole, 2, tmp_path / "resumed")
    shutil.rmtree(model)
    data.unlink()
    call(finetune.main, "resume", out)
    newest = max(map(checkpoint.step_of, checkpoint.list_checkpoints(out)))
    assert newest == 8
    assert_bitwise_equal(out, whole, 8)


# ---------------------------------------------------------------------------------------------------------
# DPO


def test_dpo_raises_the_margin_and_logs_the_rewards(base, preferences, tmp_path):
    out = tmp_path / "dpo"
    call(finetune.main, "dpo", base, preferences, "--out-dir", out, "--epochs", 20, "--max-lr", 1e-2, *FLAGS)
    rows = read_log(out / "log.csv")
    first, last = rows[0], rows[-1]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert first["val_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["val_margin"] == first["val_chosen_change"] == 0
    assert first["val_accuracy"] == 0.5, "ties count half"
    assert last["val_accuracy"] == 1.0
    assert last["val_margin"] > 1
    for row in rows[:-1]:
        assert row["margin"] == pytest.approx(row["reward_chosen"] - row["reward_rejected"], abs=1e-4)
        assert row["chosen_change"] == pytest.approx(row["reward_chosen"] / 0.1, abs=1e-3)
    assert runs.summarize(out).val_loss == last["val_sft_loss"], "not the DPO loss, and not the loss before DPO"


def test_loss_of_dpo_is_labeled_in_report_plot_and_card(base, preferences, tmp_path):
    out = tmp_path / "dpo"
    call(finetune.main, "dpo", base, preferences, "--out-dir", out, "--max-steps", 2, *FLAGS)
    assert '"loss_unit":"DPO loss per pair"' in (out / "report.html").read_text(encoding="utf-8")
    titles = [axes.get_title(loc="left") for axes in plots.draw(plots.read_runs([out]), "steps", None).axes]
    assert "loss (DPO loss per pair)" in titles
    call(export.main, out, tmp_path / "exported")
    card = (tmp_path / "exported" / "README.md").read_text(encoding="utf-8")
    assert "DPO loss per pair, mean over the validation split |" in card


@torch.no_grad()
def test_values_of_dpo_equal_their_definitions(base, preferences):
    """Log-probabilities are sums over the answer and its end token, each pair computed alone."""
    objective = objective_of("dpo", base, preferences, pairs=4, beta=0.3)
    assert isinstance(objective, DPO)
    policy = make_base_model_with_noise(objective, base)
    initial = objective.adapt(read_pretrained(base)).build(lambda values: GPT(objective.config.model)).eval()
    pairs = objective.epoch(0)[:4]
    values = dpo.summed_losses(policy, objective.pairs("train", pairs, pairs), CPU, 0.3)
    expected = torch.zeros(7)
    tokens = 0
    for pair in pairs:
        log_probs = {}
        for name, model in (("policy", policy), ("reference", initial)):
            for answer in (0, 1):
                ids, supervised = objective.train.get(2 * pair + answer, 96)
                idx = torch.from_numpy(ids.astype(np.int64))
                log_softmax = model(idx[None, :-1])[0].log_softmax(-1)
                chosen = log_softmax.gather(1, idx[1:, None])[:, 0][torch.from_numpy(supervised)[1:]]
                log_probs[name, answer] = chosen.sum()
                tokens += len(chosen) * (answer == 0 and name == "policy")
        chosen, rejected = (log_probs["policy", a] - log_probs["reference", a] for a in (0, 1))
        margin = 0.3 * (chosen - rejected)
        sft_loss = -log_probs["policy", 0]
        expected += torch.stack(
            [-F.logsigmoid(margin), 0.3 * chosen, 0.3 * rejected, margin, (margin > 0).float(), chosen, sft_loss]
        )
    expected[6] *= 4 / tokens
    torch.testing.assert_close(values, expected, atol=1e-4, rtol=0)


def make_base_model_with_noise(objective: DPO, base: Path) -> GPT:
    model = objective.adapt(read_pretrained(base)).build(lambda values: GPT(objective.config.model)).eval()
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def test_reference_is_computed_once_per_model_and_data(base, preferences, dataset, tmp_path, monkeypatch):
    first = objective_of("dpo", base, preferences)
    with monkeypatch.context() as patch:
        patch.setattr(dpo, "log_probabilities", lambda *arguments: pytest.fail("the reference is computed again"))
        again = objective_of("dpo", base, preferences)
        assert np.array_equal(first.reference["train"], again.reference["train"])
    make_base_model(dataset, tmp_path / "other", tie_head=False)
    other = objective_of("dpo", tmp_path / "other", preferences)
    assert other.config.chat.reference != first.config.chat.reference
    monkeypatch.setattr(template, "JINJA", "another template")
    assert objective_of("dpo", base, preferences).config.chat.reference != first.config.chat.reference
    assert not np.array_equal(first.reference["train"], other.reference["train"])


def test_micro_batches_of_dpo_do_not_change_the_loss(base, preferences, tmp_path):
    logs = []
    for size in (2, 4, 16):
        out = tmp_path / f"dpo-{size}"
        flags = ("--pairs", 9, "--micro-batch-size", size, "--max-steps", 3, "--max-lr", 1e-3, *FLAGS)
        call(finetune.main, "dpo", base, preferences, "--out-dir", out, *flags)
        logs.append([[row[name] for name in ("loss", *dpo.COLUMNS)] for row in read_log(out / "log.csv")[:-1]])
    for log in logs[:2]:
        assert np.array(log) == pytest.approx(np.array(logs[2]), abs=1e-4)


# ---------------------------------------------------------------------------------------------------------
# mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sft", "BASE"], "No data given. Use python finetune.py sft"),
        (["sft", "out/typo", "DATA"], "There is no model at out/typo"),
        (["sft", "BASE", "typo.jsonl"], "There is no file at typo.jsonl"),
        (["dpo", "BASE", "DATA"], "line 1 cannot be used for preferences"),
        (["resume", "BASE"], "is not a run of finetune.py"),
        (["resume", "BASE", "--rows", "4"], "A run resumes with its own settings. Omit --rows. Only --note, "),
        (["resume", "BASE", "DATA"], "A run resumes with its own settings. Omit DATA."),
        (["sft", "BASE", "DATA", "--pairs", "4", "--beta", "1"], "sft does not use --beta. Omit it."),
        (["dpo", "BASE", "DATA", "--rows=8"], "dpo does not use --rows. Omit it."),
        (["sft", "BASE", "DATA", "--epochs", "2", "--max-steps", "4"], "--max-steps replaces --epochs."),
        (["sft", "BASE", "DATA", "--max-lr", "-1"], "--max-lr -1.0 is out of range"),
    ],
)  # fmt: skip
def test_mistakes_are_explained(arguments, message, base, instructions, tmp_path):
    names = {"BASE": base, "DATA": instructions}
    with pytest.raises(UserError, match=message):
        call(finetune.main, *(names.get(argument, argument) for argument in arguments))


def test_some_settings_may_change_on_resume(base, instructions, tmp_path, capsys):
    """The learning rate, for instance, which a run that diverged needs."""
    whole = tmp_path / "whole"
    flags = ("--rows", 4, "--max-steps", 4, "--warmup", 0, "--max-lr", 1e-3, "--save-every", 1)
    call(finetune.main, "sft", base, instructions, "--out-dir", whole, *flags, "--keep", 0, *FLAGS)
    out = copy_killed_run(whole, 2, tmp_path / "resumed")
    call(finetune.main, "resume", out, "--max-lr", 5e-4, "--keep", 2)  # 2 is the default of the script
    before, after = (column(read_log(path / "log.csv"), "lr")[1] for path in (whole, out))
    assert after == pytest.approx([*before[:2], *(rate / 2 for rate in before[2:])])
    assert len(checkpoint.list_checkpoints(out)) == 2
    assert "optimizer.max_lr was 0.001, is now 0.0005" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_resume_with_another_template_is_rejected(method, base, instructions, preferences, tmp_path, monkeypatch):
    whole, data = tmp_path / "whole", instructions if method == "sft" else preferences
    flags = ("--save-every", 1, "--keep", 0, "--max-steps", 3, *FLAGS)
    call(finetune.main, method, base, data, "--out-dir", whole, *flags)
    out = copy_killed_run(whole, 2, tmp_path / "resumed")
    monkeypatch.setattr(template, "JINJA", "another template")
    with pytest.raises(ConfigError, match=r"cannot be resumed with a different .*\n  data\.template: "):
        call(finetune.main, "resume", out)


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_replay_reproduces_the_run_bitwise(method, base, instructions, preferences, tmp_path, capsys):
    """The reference of DPO is that of the run; the initial model is not needed. Changed values are reported."""
    initial, out = shutil.copytree(base, tmp_path / "base"), tmp_path / "run"
    data, column = (instructions, "loss") if method == "sft" else (preferences, "margin")
    flags = ("--save-every", 1, "--validate-every", 2, "--keep", 0, "--max-steps", 3, "--max-lr", 1e-3, *FLAGS)
    call(finetune.main, method, initial, data, "--out-dir", out, *flags)
    shutil.rmtree(initial)
    call(replay.main, out, "--device", "cpu")
    printed = capsys.readouterr().out
    assert printed.count("reproduced, bitwise equal") == 2
    assert "verification passed, 2 segments" in printed

    rows = [line.split(",") for line in (out / "log.csv").read_text().splitlines()]
    rows[2][rows[0].index(column)] = "0.5"
    (out / "log.csv").write_text("".join(",".join(row) + "\n" for row in rows))
    config = json.loads((out / "config.json").read_text())
    config["chat"]["per_step"] += 1
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit):
        call(replay.main, out, "--device", "cpu")
    printed = capsys.readouterr().out
    assert f"log.csv, step 1: {column} is 0.5, but" in printed
    assert "config.json: chat.per_step is" in printed


def test_train_script_does_not_resume_a_finetuning_run(base, instructions, tmp_path):
    out = tmp_path / "sft"
    call(finetune.main, "sft", base, instructions, "--out-dir", out, "--max-steps", 1, *FLAGS)
    with pytest.raises(UserError, match=r"It is a run of finetune\.py"):
        call(train.main, "--out-dir", out, "--init-from", "resume")
    with pytest.raises(ConfigError, match="already contains a run"):
        call(finetune.main, "sft", base, instructions, "--out-dir", out, *FLAGS)
    assert asdict(GPT.from_pretrained(out).config)["vocab_size"] == 302


# ---------------------------------------------------------------------------------------------------------
# evaluation


def test_evaluation_of_chat_models_uses_the_test_split(base, preferences, instructions, tmp_path, capsys, monkeypatch):
    """The loss equals the logged one on val, and the accuracy is relative to the reference."""
    monkeypatch.setattr(evaluate_chat, "DATA_DIRECTORY", tmp_path / "chat")
    sft, out = tmp_path / "sft", tmp_path / "dpo"
    call(finetune.main, "sft", base, instructions, "--out-dir", sft, "--max-steps", 2, *FLAGS)
    call(finetune.main, "dpo", sft, preferences, "--out-dir", out, "--epochs", 5, "--max-lr", 2e-3, *FLAGS)
    capsys.readouterr()
    for model, row in ((sft, -1), (base, 0)):
        call(evaluate_chat.main, model, instructions, "--split", "val", *FLAGS)
        loss = read_log(sft / "log.csv")[row]["val_loss"]
        assert f"response loss {loss:.4f} (" in capsys.readouterr().out
    for split in ("val", "test"):
        call(evaluate_chat.main, out, preferences, "--reference", sft, "--split", split, *FLAGS)
        printed = capsys.readouterr().out
        directory = prepare(DataSource(str(preferences)), "preferences", 0.1, tmp_path / "chat")
        count = read_manifest(directory)["splits"][split]["records"]
        assert f"({count} pairs), relative to {sft}" in printed
        assert "baseline of n-grams: preference accuracy 1.0000" in printed, "the last character differs"
        if split == "val":
            last = read_log(out / "log.csv")[-1]
            assert f"preference accuracy {last['val_accuracy']:.4f}" in printed
            assert f"response loss {last['val_sft_loss']:.4f}" in printed


def test_baselines_score_pairs():
    pairs = [{"chosen": "a good answer", "rejected": "bad"}, {"chosen": "good", "rejected": "a bad answer indeed"}]
    assert baselines.accuracy(len, pairs) == 0.5
    assert baselines.accuracy(lambda answer: 0.0, pairs) == 0.5, "ties count half"
    assert baselines.accuracy(baselines.ngram_score(pairs), pairs) == 1.0
    assert baselines.accuracy(baselines.length_score(pairs[1:]), pairs[1:]) == 1.0, "shorter ones are preferred"
