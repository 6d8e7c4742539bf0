"""Compare exported models with the originals: in transformers and, for classic models, in llama.cpp.

    python benchmarks/exports.py out/demo out/demo-classic [--out results/evaluation/exports.md]

Needs `pip install transformers`, and `gguf` and `xllamacpp` for classic models. The table lists

- the largest difference of logits, in float32, over texts of a full context,
- how many of 10 prompts are continued by the same 200 greedy tokens,
- how many of 2,000 random strings without special tokens get the same tokens from the exported tokenizer,
- whether the weights are bitwise equal after they are read back,
- for each GGUF type, how many of 12 prompts of 32 tokens llama.cpp continues by the same 24 greedy tokens, and its
  perplexity relative to ours on the last tokens of a text.

Texts and prompts are modules of Python's standard library.
"""

import argparse
import math
import os
import random
import sys
import tempfile
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from babygpt.export.directory import write_model  # noqa: E402
from babygpt.export.gguf import write_gguf  # noqa: E402
from babygpt.nn.generation import SamplingParams, generate  # noqa: E402
from babygpt.nn.huggingface import is_table  # noqa: E402
from babygpt.pretrained import Pretrained, read_pretrained  # noqa: E402
from benchmarks.table import machine, write_table  # noqa: E402
from model import GPT, ModernConfig  # noqa: E402

NUM_PROMPTS, NUM_TOKENS = 10, 200
NUM_STRINGS = 2_000
GGUF_PROMPTS, GGUF_TOKENS, PERPLEXITY_TOKENS = 12, 24, 60


def texts() -> list[str]:
    """Return 12 modules of the standard library."""
    return [path.read_text(encoding="utf-8") for path in sorted(Path(os.__file__).parent.glob("[a-d]*.py"))[:12]]


def greedy(model: GPT, prompt: list[int], count: int) -> list[int]:
    params = SamplingParams(max_new_tokens=count, temperature=0)
    return [token for (token,) in generate(model, [prompt], params) if token is not None]


def random_string(rng: random.Random) -> str:
    """Return up to 60 characters of several scripts, spaces, line breaks and words, without a special token."""
    pieces = [
        lambda: chr(rng.randrange(32, 127)), lambda: chr(rng.randrange(0xA0, 0x2FF)), lambda: rng.choice(" \n\t  "),
        lambda: chr(rng.randrange(0x4E00, 0x9FFF)), lambda: chr(rng.randrange(0x1F300, 0x1F600)),
        lambda: rng.choice(["the", " of", "'s", "123", "<|endoftext", "é", "e\u0301"]),
    ]  # fmt: skip
    return "".join(rng.choice(pieces)() for _ in range(rng.randint(0, 60)))


@torch.no_grad()
def compare_transformers(ours: GPT, weights: Pretrained, directory: Path) -> list[str]:
    """Return the cells of the table for transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory.mkdir()
    write_model(weights, directory)
    theirs = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    size, T, largest, equal = ours.config.vocab_size, ours.config.block_size, 0.0, 0
    encoded = [ours.tokenizer.encode(text) for text in texts()]
    for ids in encoded:
        idx = torch.tensor([ids[:T]])
        largest = max(largest, (theirs(idx).logits - ours(idx)[..., :size]).abs().max().item())
    for ids in encoded[:NUM_PROMPTS]:
        prompt = ids[: T - NUM_TOKENS][:32]
        settings = {"max_new_tokens": NUM_TOKENS, "do_sample": False, "eos_token_id": None}
        found = theirs.generate(torch.tensor([prompt]), **settings)[0, len(prompt) :].tolist()
        equal += found == greedy(ours, prompt, NUM_TOKENS)
    rng = random.Random(0)
    strings = [random_string(rng) for _ in range(NUM_STRINGS)]
    same = sum(tokenizer.encode(text, add_special_tokens=False) == ours.tokenizer.encode(text) for text in strings)
    again = read_pretrained(directory)
    bitwise = again.tensors.keys() == weights.tensors.keys()
    for name, tensor in again.tensors.items() if bitwise else ():
        rows = size if is_table(name) else len(tensor)  # a table may have more rows for padding
        bitwise &= torch.equal(tensor[:rows], weights.tensors[name][:rows])
    return [
        f"{largest:.1e}", f"{equal} of {NUM_PROMPTS}", f"{same:,} of {NUM_STRINGS:,}",
        "equal" if bitwise else "different",
    ]  # fmt: skip


@torch.no_grad()
def compare_llama(ours: GPT, weights: Pretrained, kind: Literal["float32", "float16"], directory: Path) -> str:
    """Return the cell of the table for a GGUF type."""
    from xllamacpp import CommonParams, Server, ggml_type

    path = directory / f"{kind}.gguf"
    write_gguf(weights, path, kind, kind)
    params = CommonParams()
    params.model.path, params.n_ctx, params.n_gpu_layers = str(path), 128, 0
    params.cache_type_k = params.cache_type_v = ggml_type.GGML_TYPE_F32  # the default is float16
    server, equal = Server(params), 0
    settings = {"temperature": 0, "cache_prompt": False}
    for text in texts()[:GGUF_PROMPTS]:
        prompt = ours.tokenizer.decode(ours.tokenizer.encode(text)[:32])
        reply = server.handle_completions({"prompt": prompt, "n_predict": GGUF_TOKENS, "n_probs": 1, **settings})
        found = [token["id"] for token in reply["choices"][0]["logprobs"]["content"]]
        equal += bool(found) and found == greedy(ours, ours.tokenizer.encode(prompt), GGUF_TOKENS)[: len(found)]
    ids, total = ours.tokenizer.encode(texts()[0])[: PERPLEXITY_TOKENS + 32], 0.0
    log_probs = ours(torch.tensor([ids]))[0, :, : ours.config.vocab_size].log_softmax(-1)
    expected = sum(-log_probs[i - 1, ids[i]].item() for i in range(32, len(ids)))
    for i in range(32, len(ids)):
        reply = server.handle_completions(
            {"prompt": ids[:i], "n_predict": 1, "n_probs": ours.config.vocab_size, **settings}
        )
        [position] = reply["choices"][0]["logprobs"]["content"]
        total -= {entry["id"]: entry["logprob"] for entry in position["top_logprobs"]}[ids[i]]
    ratio = math.exp((total - expected) / PERPLEXITY_TOKENS)
    return f"{equal} of {GGUF_PROMPTS}; {ratio:.5f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", metavar="MODEL", nargs="+", help="run, or anything else that sample.py takes")
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    options = parser.parse_args()
    lines = [
        f"`python benchmarks/exports.py {' '.join(options.models)}`, {machine()}",
        "",
        f"| model | parameters | logits | {NUM_TOKENS} greedy tokens | strings | weights | GGUF float32 | float16 |",
        "|---|---:|---:|---:|---:|---|---|---|",
    ]
    for spec in options.models:
        ours, weights = GPT.from_pretrained(spec), read_pretrained(spec)
        with tempfile.TemporaryDirectory() as temporary:
            cells = compare_transformers(ours, weights, Path(temporary) / "model")
            if isinstance(ours.config, ModernConfig):
                cells += ["-", "-"]
            else:
                cells.append(compare_llama(ours, weights, "float32", Path(temporary)))
                cells.append(compare_llama(ours, weights, "float16", Path(temporary)))
        lines.append(f"| {spec} | {ours.num_params():,} | {' | '.join(cells)} |")
        print(lines[-1], file=sys.stderr, flush=True)
    write_table(lines, options.out)


if __name__ == "__main__":
    main()
