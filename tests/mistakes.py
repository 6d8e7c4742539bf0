"""Insert each of these mistakes into a copy of the repository, and check that a test fails.

    python tests/mistakes.py            # all; takes minutes
    python tests/mistakes.py 7 13       # only these numbers

Mistakes 1 to 25 were found in public GPT-2 training code. Those from 26 on slow a GPU down or make compiled ranks wrong.
Each is a tuple (number, description, tests that must fail, replacements), with replacements (file, code, mistake).
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent

MISTAKES = [
    (1, "zero_grad is called in every micro-step", "unit/test_train.py -k depend_on_the_micro_batch",
     [("train.py", "        sums = sums + losses.detach()\n",
       "        sums = sums + losses.detach()\n        if i < len(batch.micro_batches) - 1:\n            state.optimizers[0].zero_grad()\n")]),
    (2, "gradients are never averaged over ranks", "distributed/test_ranks.py -k average_their_gradients",
     [("train.py", "grad_sync = i == len(batch.micro_batches) - 1", "grad_sync = False")]),
    (3, "the gradient synchronization flag is set after the forward pass", "distributed/test_ranks.py -k average_their_gradients",
     [("train.py", "        if isinstance(model, DistributedDataParallel):  # all-reduce", "        if False:  # read"),
      ("train.py", "            losses = loss_function(model, rows, ranks.device)\n",
       "            losses = loss_function(model, rows, ranks.device)\n        if ranks.world_size > 1:\n"
       "            model.require_backward_grad_sync = i == len(batch.micro_batches) - 1\n")]),
    (4, "gradients are clipped in every micro-step", "unit/test_train.py -k depend_on_the_micro_batch",
     [("train.py", "        sums = sums + losses.detach()\n",
       "        sums = sums + losses.detach()\n        clip_grad_norm_(model.parameters(), state.grad_clip)\n")]),
    (5, "validation computes gradients", "unit/test_train.py -k without_gradients",
     [("babygpt/evaluation/validation.py", "@torch.no_grad()\n", "")]),
    (5, "HellaSwag computes gradients", "unit/test_train.py -k without_gradients",
     [("babygpt/evaluation/scoring.py", "@torch.no_grad()\n", "")]),
    (5, "sampling computes gradients", "unit/test_train.py -k without_gradients", [("babygpt/nn/generation.py", "@torch.no_grad()\n", "")]),
    (5, "the number of validation tokens depends on the number of ranks", "unit/test_dataloader.py -k validation",
     [("dataloader.py", "for n in range(validation_rows(tokens, block_size)) if n % world_size == rank]",
       "for n in range(validation_rows(tokens, block_size))]")]),
    (6, "sampling advances the random state of training", "unit/test_train.py -k do_not_change_training",
     [("train.py", "    torch.manual_seed(seed)  # dropout", "    # dropout"),
      ("babygpt/nn/generation.py", "1, generator=generator, dtype", "1, dtype")]),
    (6, "the model stays in eval mode after validation", "unit/test_train.py -k without_gradients",
     [("train.py", "    model.train()\n    sums", "    sums"),
      ("babygpt/evaluation/validation.py", "    model.train(was_training)\n", "")]),
    (7, "the last chunk of the data is dropped", "unit/test_dataloader.py -k every_token_once",
     [("dataloader.py", "        offsets = np.concatenate", "        chunks = chunks[:-1]\n        offsets = np.concatenate")]),
    (7, "every epoch has the same order", "unit/test_dataloader.py -k two_epochs",
     [("dataloader.py", "permutation(len(chunks), self.seed, epoch)", "permutation(len(chunks), self.seed, 0)")]),
    (7, "the last partial validation batch is dropped", "unit/test_dataloader.py -k validation",
     [("dataloader.py", "for i in range(0, len(rows), micro_batch_size):\n        idx = torch.zeros",
       "for i in range(0, len(rows) - micro_batch_size + 1, micro_batch_size):\n        idx = torch.zeros")]),
    (8, "streams are read in their order in the data", "unit/test_dataloader.py -k seeded_order",
     [("dataloader.py", "permutation(self.num_streams, self.seed, epoch, 0)", "np.arange(self.num_streams)")]),
    (8, "chunks are not shuffled", "unit/test_dataloader.py -k two_epochs",
     [("dataloader.py", "        if self.shuffle:\n            chunks = chunks", "        if False:\n            chunks = chunks")]),
    (9, "duplicates are kept, so a document is in both splits", "unit/test_fineweb.py",
     [("babygpt/data/plan.py", "        return rows[~is_duplicate]\n", "        self.decisions[rows[\"document\"][is_duplicate]] = KEPT\n        return rows\n")]),
    (10, "the search window for an EOT never widens", "unit/test_dataloader.py -k nearest",
     [("dataloader.py", "            if radius == max_radius:", "            if True:")]),
    (10, "the last target is beyond the end of the data", "unit/test_dataloader.py -k every_token_once",
     [("dataloader.py", "max(0, num_tokens - 1) //", "max(0, num_tokens) //")]),
    (11, "rows are drawn with replacement", "unit/test_dataloader.py -k every_token_once",
     [("dataloader.py", "        ranges: list[tuple[int, int]] = []\n",
       "        start = hash(n) % 7 * self.block_size\n        end = start + self.block_size + 1\n"
       "        ranges: list[tuple[int, int]] = []\n")]),
    (11, "a resume repeats the last batch", "unit/test_train.py -k resumed_at_any_step",
     [("train.py", "batch.num_tokens, batch.end", "batch.num_tokens, batch.start")]),
    (11, "a resume does not restore the optimizer", "unit/test_train.py -k resumed_at_any_step",
     [("train.py", "    if start.optimizer_state:\n", "    if False:\n")]),
    (12, "a checkpoint is overwritten in place", "unit/test_checkpoint.py",
     [("babygpt/training/checkpoint.py", 'temporary = directory / f".{final.name}.tmp"', "temporary = final")]),
    (12, "the latest checkpoint is not verified", "unit/test_checkpoint.py -k latest",
     [("babygpt/training/checkpoint.py", "            verify(path)\n            return path", "            return path")]),
    (13, "the last partial HellaSwag batch is dropped", "unit/test_hellaswag.py",
     [("babygpt/evaluation/scoring.py", "range(0, len(group), batch_size)", "range(0, len(group) - batch_size + 1, batch_size)")]),
    (13, "the ending is truncated instead of the context", "unit/test_hellaswag.py",
     [("babygpt/evaluation/packing.py", "text[: len(text) - scored], {k: text[len(text) - scored :]}", "example.context[:-1][:block_size], {k: ending[:2]}")]),
    (13, "acc_norm uses the sum of the losses instead of the mean", "unit/test_hellaswag.py",
     [("hellaswag.py", "(loss_sums / lengths).argmin(dim=1)", "loss_sums.argmin(dim=1)")]),
    (13, "the padding of the vocabulary is scored", "unit/test_hellaswag.py -k padding",
     [("model.py", '        logits[..., self.config.vocab_size :] = float("-inf")\n', "")]),
    (14, "a resume deletes the log", "unit/test_log.py",
     [("babygpt/training/log.py", "read_log(path, step) if step > 0", "[] if step > 0")]),
    (14, "steps appear twice in the log after a resume", "unit/test_log.py", [("babygpt/training/log.py", "kept = read_log(path, step)", "kept = read_log(path)")]),
    (15, "MFU uses the peak FLOPS of an A100 on every GPU", "unit/test_distributed.py -k peak",
     [("babygpt/training/device.py", "return PEAK_FLOPS[max(known, key=len)] if known else None", "return 312e12")]),
    (15, "throughput includes validation", "unit/test_train.py -k throughput",
     [("babygpt/training/monitor.py", "            self.in_flight = None\n        self.next_start = None\n", "            self.in_flight = None\n")]),
    (16, "all ranks download at the same time", "unit/test_distributed.py -k fetches",
     [("babygpt/training/distributed.py", "            if my_turn and not called:", "            if not called:")]),
    (17, "a truncated shard is opened without an error", "unit/test_shards.py",
     [("babygpt/data/shards.py", "    if size != expected:", "    if False:")]),
    (17, "a token id that is too large for its dtype wraps around", "unit/test_shards.py",
     [("babygpt/data/shards.py", "            if len(piece) and not 0 <=", "            if False and not 0 <=")]),
    (17, "a corrupted checkpoint is loaded", "unit/test_checkpoint.py -k corrupted_file",
     [("babygpt/training/checkpoint.py", "    if wrong:\n", "    if False:\n")]),
    (18, "every decode step recomputes the prefix", "unit/test_sample.py -k computes_one_token",
     [("babygpt/nn/generation.py", "        if cache.length < T:", "        if False:")]),
    (19, "the cosine schedule includes the warmup steps", "unit/test_optim.py -k cosine",
     [("babygpt/training/schedule.py", "(step - self.warmup_steps) / max(1, self.max_steps - self.warmup_steps)", "step / self.max_steps")]),
    (20, "an untrusted pickle is loaded", "unit/test_checkpoint.py -k pickle",
     [("babygpt/training/checkpoint.py", "weights_only=True", "weights_only=False")]),
    (21, "SFT trains on the prompt too", "unit/test_chat_data.py -k packed_loss",
     [("babygpt/chat/packing.py", "np.where(supervised[1:], ids[1:].astype(np.int64), IGNORE_INDEX)", "ids[1:].astype(np.int64)")]),
    (21, "SFT trains on the messages of the user", "unit/test_chat_template.py -k only_contents",
     [("babygpt/chat/template.py", "is_supervised = message[\"role\"] == \"assistant\" and", "is_supervised =")]),
    (22, "a conversation that is longer than a row is not truncated", "unit/test_finetune.py -k truncated",
     [("babygpt/chat/packing.py", "stop = min(self.starts[i + 1], start + block_size + 1)", "stop = self.starts[i + 1]")]),
    (22, "a row may have no supervised token", "unit/test_finetune.py -k truncated",
     [("finetune.py", "np.flatnonzero(sequences.num_supervised(self.block_size))", "np.arange(len(sequences))")]),
    (23, "the loss is a mean per micro-batch", "unit/test_finetune.py -k mean_over_all",
     [("finetune.py", "reduction=\"sum\")[None]", "reduction=\"mean\")[None] * 50")]),
    (24, "a special token in a message is encoded as such", "unit/test_chat_template.py -k ordinary_text",
     [("babygpt/data/tokenizer.py", "self.backend.encode_special_tokens = True", "self.backend.encode_special_tokens = False")]),
    (25, "the loss is accumulated in place", "unit/test_cross_entropy.py -k compiled",
     [("babygpt/nn/cross_entropy.py", "loss = loss + part_loss", "loss += part_loss")]),
    (26, "the host reads the loss in every micro-step", "unit/test_compiled_step.py -k reads_nothing",
     [("train.py", "sums = sums + losses.detach()", "sums = sums + losses.item()")]),
    (26, "a scalar is copied to the device in every step", "unit/test_compiled_step.py -k copies_nothing",
     [("babygpt/training/guard.py", "torch.full_like(loss, float(stop))", "torch.tensor(float(stop)).to(loss.device)")]),
    (26, "validation uses the eager model", "unit/test_train.py -k uses_the_compiled_model",
     [("train.py", "run.objective.validate(run.fast_model", "run.objective.validate(run.raw_model")]),
    (26, "the host reads the loss of every validation batch", "unit/test_compiled_step.py -k validation",
     [("babygpt/evaluation/validation.py", "**kwargs))", "**kwargs).cpu())\n            losses[-1].item()")]),
    (26, "the optimizer waits for the device", "unit/test_compiled_step.py -k reads_nothing",
     [("babygpt/training/optim.py", "if self.found_inf is not None:", "if self.found_inf is not None and self.found_inf.item() < 2:")]),
    (27, "the compiled loss scatters into the logits", "unit/test_compiled_step.py -k scatter",
     [("babygpt/nn/cross_entropy.py", "    if compiled:  # pointwise", "    if False:  # pointwise")]),
    (27, "the compiled loss uses chunks of 2,341 rows, which is not a multiple of 128", "unit/test_compiled_step.py -k scatter",
     [("babygpt/nn/cross_entropy.py", "    if not (compiled and device_type == \"cuda\"):", "    if True:")]),
    (27, "the forward pass has a graph break", "unit/test_compiled_step.py -k one_graph",
     [("model.py", "        for block in self.h:\n", "        torch._dynamo.graph_break()\n        for block in self.h:\n")]),
    (27, "more activations are saved for the backward pass", "unit/test_compiled_step.py -k budget",
     [("model.py", "        if self.bf16_activations and", "        if False and")]),
    (28, "compiled ranks synchronize in the first micro-step", "distributed/test_compiled_ranks.py -k eager_gradients[gpt2]",
     [("train.py", "require_backward_grad_sync = i == len(batch.micro_batches) - 1", "require_backward_grad_sync = i == 0")]),
    (28, "compiled ranks never average their gradients", "distributed/test_compiled_ranks.py -k eager_gradients[gpt2]",
     [("train.py", "require_backward_grad_sync = i == len(batch.micro_batches) - 1", "require_backward_grad_sync = False")]),
]  # fmt: skip

TORCH_VERSIONS = {25: "2.11."}  # versions of PyTorch on which a mistake has an effect


def ignored_names(directory: str, names: list[str]) -> set[str]:
    """Return the names that are not copied: caches, and at the root data, runs and environments."""
    root = [name for name in names if name in (".git", "data", "out") or name.startswith(".venv")]
    return {"__pycache__", *(root if Path(directory) == ROOT else [])}


def tests_pass(tests: str, replacements: list[tuple[str, str, str]]) -> bool:
    """Run tests in a copy of the repository with the replacements made; return whether they pass."""
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory) / "copy"
        shutil.copytree(ROOT, copy, ignore=ignored_names)
        for file, code, mistake in replacements:
            text = (copy / file).read_text(encoding="utf-8")
            if code not in text:
                sys.exit(f"error: {file} does not contain {code!r}. Adapt this mistake to the current code.")
            (copy / file).write_text(text.replace(code, mistake), encoding="utf-8")
        file, *options = tests.split()
        command = [sys.executable, "-m", "pytest", "-x", "-q", f"tests/{file}", *options]
        done = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=600)
        if done.returncode not in (0, 1):
            sys.exit(f"error: pytest exited with code {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        return done.returncode == 0


def main() -> None:
    numbers = {int(number) for number in sys.argv[1:]}
    excluded = {n for n, version in TORCH_VERSIONS.items() if not torch.__version__.startswith(version)}
    if numbers & excluded:
        sys.exit(
            f"error: Mistakes {sorted(numbers & excluded)} have an effect only on these PyTorch versions: "
            f"{TORCH_VERSIONS}, not on {torch.__version__}. Use bash runs/test.sh --slow."
        )
    selected = [m for m in MISTAKES if m[0] not in excluded and (not numbers or m[0] in numbers)]
    for tests in sorted({tests for _, _, tests, _ in selected}):
        if not tests_pass(tests, []):
            sys.exit(f"error: {tests} fails without a mistake.")
    num_missed = 0
    for number, description, tests, replacements in selected:
        missed = tests_pass(tests, replacements)
        num_missed += missed
        print(f"{number:>2}  {'MISSED' if missed else 'caught':<6}  {description}  [{tests}]", flush=True)
    sys.exit(1 if num_missed else 0)


if __name__ == "__main__":
    main()
