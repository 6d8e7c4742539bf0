"""Puts each mistake of this kind of code into a copy of ours, and sees a test fail.

    python tests/mistakes.py            # all, some minutes
    python tests/mistakes.py 7 13       # those numbers alone

Numbers up to 25 are of a list of mistakes found in public GPT-2 training code; 26 to 28 make a GPU slow or compiled
ranks wrong. A mistake is (number, what it is, the tests that must fail, and replacements (file, ours, the mistake)).
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent

MISTAKES = [
    (1, "zero_grad inside the micro-step loop", "unit/test_train.py -k depend_on_the_micro_batch",
     [("train.py", "        loss_sum += loss.detach()\n",
       "        loss_sum += loss.detach()\n        if i < len(batch.micro_batches) - 1:\n            state.optimizers[0].zero_grad()\n")]),
    (2, "gradients never averaged over ranks", "distributed/test_ranks.py -k average_their_gradients",
     [("train.py", "grad_sync = i == len(batch.micro_batches) - 1", "grad_sync = False")]),
    (3, "the sync flag set after the forward", "distributed/test_ranks.py -k average_their_gradients",
     [("train.py", "        if isinstance(model, DistributedDataParallel):  # all-reduce", "        if False:  # read"),
      ("train.py", "            loss = loss_function(model, rows, ranks.device)\n",
       "            loss = loss_function(model, rows, ranks.device)\n        if ranks.world_size > 1:\n"
       "            model.require_backward_grad_sync = i == len(batch.micro_batches) - 1\n")]),
    (4, "clipping once a micro-batch", "unit/test_train.py -k depend_on_the_micro_batch",
     [("train.py", "        loss_sum += loss.detach()\n",
       "        loss_sum += loss.detach()\n        clip_grad_norm_(model.parameters(), state.grad_clip)\n")]),
    (5, "validation with gradients on", "unit/test_train.py -k without_gradients",
     [("babygpt/evaluation/validation.py", "@torch.no_grad()\n", "")]),
    (5, "HellaSwag with gradients on", "unit/test_train.py -k without_gradients",
     [("hellaswag.py", "@torch.no_grad()\n", "")]),
    (5, "sampling with gradients on", "unit/test_train.py -k without_gradients", [("babygpt/nn/generation.py", "@torch.no_grad()\n", "")]),
    (5, "validation over an amount that depends on the ranks", "unit/test_dataloader.py -k validation",
     [("dataloader.py", "for n in range(validation_rows(tokens, block_size)) if n % world_size == rank]",
       "for n in range(validation_rows(tokens, block_size))]")]),
    (6, "random state taken by sampling is missing in training", "unit/test_train.py -k do_not_change_training",
     [("train.py", "    torch.manual_seed(seed)  # dropout", "    # dropout"),
      ("babygpt/nn/generation.py", "1, generator=generator, dtype", "1, dtype")]),
    (6, "the model stays in eval mode", "unit/test_train.py -k without_gradients",
     [("train.py", "    model.train()\n    loss_sum", "    loss_sum"),
      ("babygpt/evaluation/validation.py", "    model.train(was_training)\n", "")]),
    (7, "the tail of the data is dropped", "unit/test_dataloader.py -k every_token_once",
     [("dataloader.py", "        offsets = np.concatenate", "        chunks = chunks[:-1]\n        offsets = np.concatenate")]),
    (7, "every epoch in the same order", "unit/test_dataloader.py -k two_epochs",
     [("dataloader.py", "permutation(len(chunks), self.seed, epoch)", "permutation(len(chunks), self.seed, 0)")]),
    (7, "the last partial batch of validation is dropped", "unit/test_dataloader.py -k validation",
     [("dataloader.py", "for i in range(0, len(rows), micro_batch_size):\n        idx = torch.zeros",
       "for i in range(0, len(rows) - micro_batch_size + 1, micro_batch_size):\n        idx = torch.zeros")]),
    (8, "no shuffle", "unit/test_dataloader.py -k two_epochs",
     [("dataloader.py", "        if self.shuffle:\n            chunks = chunks", "        if False:\n            chunks = chunks")]),
    (9, "a document on both sides of the split", "unit/test_fineweb.py",
     [("babygpt/data/plan.py", "        return rows[~is_duplicate]\n", "        self.decisions[rows[\"document\"][is_duplicate]] = KEPT\n        return rows\n")]),
    (10, "the search for an end of text never widens", "unit/test_dataloader.py -k nearest",
     [("dataloader.py", "            if width == widest:", "            if True:")]),
    (10, "a target beyond the end of the data", "unit/test_dataloader.py -k every_token_once",
     [("dataloader.py", "max(0, int(self.offsets[-1]) - 1) //", "max(0, int(self.offsets[-1])) //")]),
    (11, "rows drawn with replacement", "unit/test_dataloader.py -k every_token_once",
     [("dataloader.py", "        ranges: list[tuple[int, int]] = []\n",
       "        begin = hash(n) % 7 * self.block_size\n        end = begin + self.block_size + 1\n"
       "        ranges: list[tuple[int, int]] = []\n")]),
    (11, "a resume that replays the last batch", "unit/test_train.py -k resumed_at_any_step",
     [("train.py", "training.batch_tokens, batch.end", "training.batch_tokens, batch.start")]),
    (11, "optimizer missing from a resume", "unit/test_train.py -k resumed_at_any_step",
     [("train.py", "    if start.optimizer_state:\n", "    if False:\n")]),
    (12, "a checkpoint overwritten in place", "unit/test_checkpoint.py",
     [("babygpt/training/checkpoint.py", 'temporary = folder / f".{final.name}.tmp"', "temporary = final")]),
    (12, "a half-written checkpoint is the latest", "unit/test_checkpoint.py -k latest",
     [("babygpt/training/checkpoint.py", "            verify(path)\n            return path", "            return path")]),
    (13, "HellaSwag's last partial batch dropped", "unit/test_hellaswag.py",
     [("hellaswag.py", "range(0, len(rows), batch_size)", "range(0, len(rows) - batch_size + 1, batch_size)")]),
    (13, "the ending cut instead of the context", "unit/test_hellaswag.py",
     [("babygpt/evaluation/packing.py", "example.context[-max_context[k] :], {k: ending}", "example.context[:-1][:block_size], {k: ending[:2]}")]),
    (13, "picked by sum where the mean is reported", "unit/test_hellaswag.py",
     [("hellaswag.py", "(sums / lengths).argmin(dim=1)", "sums.argmin(dim=1)")]),
    (13, "padding of the vocabulary is scored", "unit/test_hellaswag.py -k padding",
     [("model.py", '        logits[..., self.config.vocab_size :] = float("-inf")\n', "")]),
    (14, "the log is wiped at a restart", "unit/test_log.py",
     [("babygpt/training/log.py", "read_log(path, step) if step > 0", "[] if step > 0")]),
    (14, "steps stand twice in the log", "unit/test_log.py", [("babygpt/training/log.py", "kept = read_log(path, step)", "kept = read_log(path)")]),
    (15, "MFU by an A100's peak", "unit/test_distributed.py -k peak",
     [("babygpt/training/device.py", "return PEAK_FLOPS[max(known, key=len)] if known else None", "return 312e12")]),
    (15, "throughput counts evaluation", "unit/test_train.py -k throughput",
     [("babygpt/training/monitor.py", "            self.in_flight = None\n        self.begin = None\n", "            self.in_flight = None\n")]),
    (16, "all ranks download at once", "unit/test_distributed.py -k fetches",
     [("babygpt/training/distributed.py", "            if my_turn and not called:", "            if not called:")]),
    (17, "a shortened file is mapped in silence", "unit/test_shards.py",
     [("babygpt/data/shards.py", "    if size != expected:", "    if False:")]),
    (17, "a large id wraps into a small one", "unit/test_shards.py",
     [("babygpt/data/shards.py", "            if len(piece) and not 0 <=", "            if False and not 0 <=")]),
    (17, "flipped bytes of a checkpoint are loaded", "unit/test_checkpoint.py -k damaged",
     [("babygpt/training/checkpoint.py", "    if wrong:\n", "    if False:\n")]),
    (18, "the whole prefix again for every token", "unit/test_sample.py -k one_tokens_work",
     [("babygpt/nn/generation.py", "        if cache.length < T:", "        if False:")]),
    (19, "the cosine runs over the total steps", "unit/test_optim.py -k cosine",
     [("babygpt/training/schedule.py", "(step - self.warmup_steps) / max(1, self.max_steps - self.warmup_steps)", "step / self.max_steps")]),
    (20, "an untrusted pickle is loaded", "unit/test_checkpoint.py -k pickle",
     [("babygpt/training/checkpoint.py", "weights_only=True", "weights_only=False")]),
    (25, "the loss accumulated in place", "unit/test_cross_entropy.py -k compiled",
     [("babygpt/nn/cross_entropy.py", "loss = loss + part_loss", "loss += part_loss")]),
    (26, "the host reads the loss in every step", "unit/test_compiled_step.py -k reads_nothing",
     [("train.py", "loss_sum += loss.detach()", "loss_sum += loss.item()")]),
    (26, "a number is copied to the device", "unit/test_compiled_step.py -k copies_nothing",
     [("babygpt/training/guard.py", "torch.full_like(loss, float(stop))", "torch.tensor(float(stop)).to(loss.device)")]),
    (26, "validation uses the eager model", "unit/test_train.py -k uses_the_compiled_model",
     [("train.py", "run.fast_model, run.dataset", "run.raw_model, run.dataset")]),
    (26, "the host reads the loss of every batch of validation", "unit/test_compiled_step.py -k validation",
     [("babygpt/evaluation/validation.py", "reduction=\"sum\"))", "reduction=\"sum\").cpu())\n            losses[-1].item()")]),
    (26, "the optimizer waits for the device", "unit/test_compiled_step.py -k reads_nothing",
     [("babygpt/training/optim.py", "if self.found_inf is not None:", "if self.found_inf is not None and self.found_inf.item() < 2:")]),
    (27, "a scatter into compiled logits", "unit/test_compiled_step.py -k scatter",
     [("babygpt/nn/cross_entropy.py", "    if torch.compiler.is_compiling():  # pointwise", "    if False:  # pointwise")]),
    (27, "compiled chunks of 2,341 rows", "unit/test_compiled_step.py -k scatter",
     [("babygpt/nn/cross_entropy.py", "    if not (compiled and device_type == \"cuda\"):", "    if True:")]),
    (27, "a graph break in the forward pass", "unit/test_compiled_step.py -k one_graph",
     [("model.py", "        for block in self.h:\n", "        torch._dynamo.graph_break()\n        for block in self.h:\n")]),
    (27, "more activations kept for the backward pass", "unit/test_compiled_step.py -k budget",
     [("model.py", "        if self.bf16_activations and", "        if False and")]),
    (28, "compiled ranks synchronize in the first micro-batch", "distributed/test_compiled_ranks.py -k eager_gradients[gpt2]",
     [("train.py", "require_backward_grad_sync = i == len(batch.micro_batches) - 1", "require_backward_grad_sync = i == 0")]),
    (28, "compiled ranks do not average", "distributed/test_compiled_ranks.py -k eager_gradients[gpt2]",
     [("train.py", "require_backward_grad_sync = i == len(batch.micro_batches) - 1", "require_backward_grad_sync = False")]),
]  # fmt: skip

ONLY_ON = {25: "2.11."}  # PyTorch versions on which a mistake is visible


def left_out(folder: str, names: list[str]) -> set[str]:
    """Names that are not copied: caches, and at the root data, runs and environments."""
    root = [name for name in names if name in (".git", "data", "out") or name.startswith(".venv")]
    return {"__pycache__", *(root if Path(folder) == ROOT else [])}


def survives(tests: str, changes: list[tuple[str, str, str]]) -> bool:
    """Whether the tests pass in a copy with the changes made. (With none: they must, or they prove nothing.)"""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=left_out)
        for file, ours, mistake in changes:
            text = (copy / file).read_text(encoding="utf-8")
            if ours not in text:
                sys.exit(f"error: {file} has no longer the place {ours!r}: this mistake needs a new one.")
            (copy / file).write_text(text.replace(ours, mistake), encoding="utf-8")
        file, *options = tests.split()
        command = [sys.executable, "-m", "pytest", "-x", "-q", f"tests/{file}", *options]
        done = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=600)
        if done.returncode not in (0, 1):
            sys.exit(f"error: the tests did not run:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        return done.returncode == 0


def main() -> None:
    wanted = {int(number) for number in sys.argv[1:]}
    elsewhere = {n for n, version in ONLY_ON.items() if not torch.__version__.startswith(version)}
    if wanted & elsewhere:
        sys.exit(f"error: these mistakes show on another PyTorch version only: {ONLY_ON}. bash runs/test.sh --slow")
    chosen = [m for m in MISTAKES if m[0] not in elsewhere and (not wanted or m[0] in wanted)]
    for tests in sorted({tests for _, _, tests, _ in chosen}):
        if not survives(tests, []):
            sys.exit(f"error: {tests} fails without any mistake.")
    missed = 0
    for number, what, tests, changes in chosen:
        missed += (survived := survives(tests, changes))
        print(f"{number:>2}  {'NOT SEEN' if survived else 'seen':<8}  {what}  [{tests}]", flush=True)
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
