"""Write the replies of several models to the same held-out prompts, unedited.

    python benchmarks/replies.py instructions.jsonl out/demo out/demo-sft out/demo-sft-dpo --out replies.md

The prompts are the first ones of the split `test` that leave half of the context of each model for the reply. Each
model generates one reply per prompt, with the default sampling settings of chat.py and the seed 1337. The special
tokens of the chat template are added to a base model as at the start of finetuning.
"""

import argparse
import sys
from itertools import islice
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from babygpt.chat.conversations import DataSource, find_kind, first_prompt, prepare, read_split  # noqa: E402
from babygpt.chat.reply import limit_to_context, reply  # noqa: E402
from babygpt.nn.generation import SamplingParams  # noqa: E402
from babygpt.pretrained import read_pretrained  # noqa: E402
from benchmarks.table import machine, write_table  # noqa: E402
from chat import ChatArgs  # noqa: E402
from finetune import DATA_DIRECTORY  # noqa: E402
from tools.evaluate_chat import HELD_OUT, build_chat_model, held_out_of  # noqa: E402


def fenced(text: str) -> list[str]:
    """Return a text as a code block of Markdown."""
    fence = "~~~~"
    while fence in text:
        fence += "~"
    return [f"{fence}text", text, fence, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", metavar="DATA", help="records that the models were finetuned on")
    parser.add_argument("models", nargs="+", metavar="MODEL", help="base model, and models of finetune.py")
    parser.add_argument("--count", type=int, default=10, metavar="N", help="number of prompts (default: 10)")
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    options = parser.parse_args()
    fractions = {used for model in options.models if (used := held_out_of(model)) is not None} or {HELD_OUT}
    if len(fractions) > 1:
        sys.exit(f"error: the models were finetuned with different values of --held-out: {fractions}.")
    loaded = {spec: build_chat_model(read_pretrained(spec)) for spec in options.models}
    source = DataSource(options.data)
    records = read_split(prepare(source, find_kind(source), fractions.pop(), DATA_DIRECTORY), "test")
    fitting = (
        prompt
        for prompt in map(first_prompt, records)
        if prompt and all(len(t.prompt(prompt)) <= model.config.block_size // 2 for model, t in loaded.values())
    )
    prompts = list(islice(fitting, options.count))
    if not prompts:
        sys.exit(f"error: no prompt of {options.data} fits into half of the context of each model.")
    lines = [f"`python benchmarks/replies.py {' '.join(sys.argv[1:])}`, {machine()}", ""]
    for number, prompt in enumerate(prompts, 1):
        lines += [f"## {number}", ""]
        for message in prompt:
            lines += [f"{message['role']}:", "", *fenced(message["content"])]
        for spec, (model, template) in loaded.items():
            params = SamplingParams(max_new_tokens=ChatArgs.max_new_tokens, temperature=ChatArgs.temperature)
            params = limit_to_context(params, len(template.prompt(prompt)), model.config.block_size)
            lines += [f"{spec}:", "", *fenced("".join(reply(model, template, prompt, params)))]
    write_table(lines, options.out)


if __name__ == "__main__":
    main()
