"""Compare finetune.py with TRL's own trainers: losses, rewards, and the weights after one step of AdamW."""

import json
import random
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from support.chat import make_base_model, save_instructions, save_preferences
from support.helpers import call, random_text
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import finetune
from babygpt.chat.conversations import DataSource, prepare, read_split
from babygpt.chat.template import ChatTemplate, chat_tokenizer
from babygpt.chat.vocabulary import with_chat_tokens
from babygpt.data.tokenizer import load_tokenizer
from babygpt.export.directory import write_model
from babygpt.nn.huggingface import import_tensors
from babygpt.pretrained import read_pretrained
from babygpt.training import checkpoint
from babygpt.training.log import read_log

LR = 3e-4
SETTINGS = {
    "max_steps": 1, "learning_rate": LR, "adam_beta1": 0.9, "adam_beta2": 0.95, "adam_epsilon": 1e-8,
    "weight_decay": 0.0, "max_grad_norm": 1.0, "lr_scheduler_type": "constant", "use_cpu": True, "bf16": False,
    "report_to": [], "logging_steps": 1, "save_strategy": "no", "gradient_checkpointing": False,
    "disable_tqdm": True,
}  # fmt: skip


@pytest.fixture
def base(dataset, tmp_path) -> tuple[Path, Path]:
    """Return a run of a tiny model, and the same model exported with the chat tokens.

    A classic one: TRL replaces the forward pass, and needs a body without the head, which modern models do not have.
    """
    make_base_model(dataset, tmp_path / "base")
    (tmp_path / "exported").mkdir()
    write_model(with_chat_tokens(read_pretrained(tmp_path / "base")), tmp_path / "exported")
    return tmp_path / "base", tmp_path / "exported"


def load(exported: Path) -> tuple:
    return AutoModelForCausalLM.from_pretrained(exported).float(), AutoTokenizer.from_pretrained(exported)


def assert_weights_equal(run: Path, theirs: torch.nn.Module) -> None:
    """Compare the weights after the step, and check that they moved.

    Except where the gradient is smaller than 1e-6, and so mostly a rounding error: AdamW moves such a weight by up to
    the learning rate, in a direction that depends on the rounding. The gradients of the biases of keys are such errors.
    """
    loaded = checkpoint.load(run / "checkpoints" / "step_00000001")
    imported = import_tensors(theirs.state_dict(), loaded.state["model"])
    initial = with_chat_tokens(read_pretrained(run.parent / "base")).tensors
    assert imported.keys() == loaded.model.keys()
    num_compared = num_weights = 0
    for name, tensor in loaded.model.items():
        rows = 302 if name == "wte.weight" else len(tensor)  # without padding
        gradient = loaded.optimizer[name]["exp_avg"][:rows] / 0.1
        differences = (tensor[:rows] - imported[name][:rows]).abs()[gradient.abs() > 1e-6]
        assert differences.max() <= 1e-6, name
        num_compared, num_weights = num_compared + differences.numel(), num_weights + gradient.numel()
        assert (tensor - initial[name]).abs().max() > LR / 2, name
    assert num_compared > 0.9 * num_weights


def test_sft_equals_trl(base, tmp_path):
    run, exported = base
    data = save_instructions(tmp_path / "data.jsonl", 8)
    directory = prepare(DataSource(str(data)), "conversations", 0.0, tmp_path / "chat")
    flags = ("--rows", 100, "--max-steps", 1, "--warmup", 0, "--max-lr", LR, "--held-out", 0, "--device", "cpu")
    call(finetune.main, "sft", run, directory, "--out-dir", tmp_path / "sft", *flags, "--dtype", "float32")
    ours = read_log(tmp_path / "sft" / "log.csv")[0]

    model, tokenizer = load(exported)
    records = [{"messages": record["messages"]} for record in read_split(directory, "train")]
    config = SFTConfig(
        str(tmp_path / "trl"), per_device_train_batch_size=len(records), assistant_only_loss=True, max_length=96,
        **SETTINGS,
    )  # fmt: skip
    trainer = SFTTrainer(model, config, train_dataset=Dataset.from_list(records), processing_class=tokenizer)
    trainer.train()
    logged = trainer.state.log_history[0]
    assert ours["loss"] == pytest.approx(logged["loss"], abs=1e-5)
    assert ours["grad_norm"] == pytest.approx(logged["grad_norm"], abs=1e-4)
    assert_weights_equal(tmp_path / "sft", trainer.model)


def test_dpo_equals_trl(base, tmp_path):
    """After a first step of ours, so that the model is not the reference: TRL gets both."""
    run, exported = base
    data = save_preferences(tmp_path / "data.jsonl", 6)
    directory = prepare(DataSource(str(data)), "preferences", 0.0, tmp_path / "chat")
    flags = ("--pairs", 100, "--warmup", 0, "--max-lr", LR, "--device", "cpu", "--dtype", "float32")
    call(finetune.main, "dpo", run, directory, "--out-dir", tmp_path / "dpo", "--max-steps", 1, *flags)
    call(finetune.main, "dpo", run, directory, "--out-dir", tmp_path / "two", "--max-steps", 2, *flags)

    template = ChatTemplate(read_pretrained(exported).tokenizer)
    records = [
        {
            "prompt": template.tokenizer.decode(template.prompt(record["prompt"])),
            "chosen": f"{record['chosen']}<|im_end|>", "rejected": f"{record['rejected']}<|im_end|>",
        }
        for record in read_split(directory, "train")
    ]  # fmt: skip
    model, tokenizer = load(exported)
    reference, _ = load(exported)
    config = DPOConfig(
        str(tmp_path / "trl"), per_device_train_batch_size=len(records), beta=0.1, max_length=96, **SETTINGS
    )  # fmt: skip
    model.config.dropout = 0.0
    trainer = DPOTrainer(
        model, reference, config, train_dataset=Dataset.from_list(records), processing_class=tokenizer
    )  # fmt: skip
    trainer.train()
    first = read_log(tmp_path / "dpo" / "log.csv")[0]
    logged = trainer.state.log_history[0]
    assert first["loss"] == pytest.approx(logged["loss"], abs=1e-5)
    assert first["grad_norm"] == pytest.approx(logged["grad_norm"], abs=1e-4)
    assert_weights_equal(tmp_path / "dpo", trainer.model)

    batch = next(iter(trainer.get_train_dataloader()))  # the same pairs, after the step
    trainer.model.eval()
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, batch)
    after = read_log(tmp_path / "two" / "log.csv")
    assert after[0]["lr"] == LR
    assert after[1]["loss"] == pytest.approx(loss.item(), abs=1e-5)
    rewards = {name: values[-1] for name, values in trainer._metrics["eval"].items() if name.startswith("rewards/")}
    for ours, theirs in (
        ("reward_chosen", "chosen"), ("reward_rejected", "rejected"), ("margin", "margins"), ("accuracy", "accuracies"),
    ):  # fmt: skip
        assert after[1][ours] == pytest.approx(rewards[f"rewards/{theirs}"], abs=1e-4), ours


def test_template_equals_that_of_exported_models(base, tmp_path):
    """Tokens and masks of 2,000 conversations of random text, with GPT-2's tokenizer and the trained one."""
    _, exported = base
    rng = random.Random(3)
    _, trained = load(exported)
    gpt2 = chat_tokenizer(load_tokenizer("gpt2"))
    for ours, theirs in ((read_pretrained(exported).tokenizer, trained), (gpt2, None)):
        template = ChatTemplate(ours)
        if theirs is None:
            (tmp_path / "gpt2").mkdir()
            from babygpt.export.directory import write_tokenizer

            write_tokenizer(gpt2, 1024, tmp_path / "gpt2")
            theirs = AutoTokenizer.from_pretrained(tmp_path / "gpt2")
        for _ in range(1000):
            roles = ["system"] * rng.randint(0, 1) + ["user", "assistant"] * rng.randint(1, 4)
            messages = [{"role": role, "content": random_text(rng.randrange(10**9))} for role in roles]
            found = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
            ids, supervised = template.encode(messages)
            assert (found["input_ids"], found["assistant_masks"]) == (ids, list(map(int, supervised)))


def test_exported_chat_model_ends_its_reply(base, tmp_path):
    """generation_config.json has <|im_end|> as the end of a text."""
    _, exported = base
    model, tokenizer = load(exported)
    assert json.loads((exported / "generation_config.json").read_text())["eos_token_id"] == 301
    assert (tokenizer.eos_token, tokenizer.bos_token) == ("<|im_end|>", "<|endoftext|>")
    with torch.no_grad():
        model.lm_head.weight[301] = 100 * model.lm_head.weight.mean(dim=0)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert model.generate(**inputs, max_new_tokens=5, do_sample=False).size(1) <= inputs["input_ids"].size(1) + 5
