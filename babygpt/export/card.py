"""Write the model card of an exported model: README.md with what the hub and a reader need to know about it."""

import json
from pathlib import Path

from babygpt.chat.template import is_chat_tokenizer
from babygpt.console import counted
from babygpt.nn import huggingface
from babygpt.pretrained import Pretrained
from babygpt.training import checkpoint
from babygpt.training.log import loss_unit, read_scores
from babygpt.training.plots import read_runs
from babygpt.training.report import scores

BASE_INPUTS = 'inputs = tokenizer("{eot}Once upon a time", return_tensors="pt")'
CHAT_INPUTS = """messages = [{"role": "user", "content": "What is the capital of France?"}]
options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
inputs = tokenizer.apply_chat_template(messages, **options)"""


def model_card(model: Pretrained, num_params: int, name: str, license: str | None, run: Path | None) -> str:
    """Return the text of a card. `run` is the run directory of the model; None if it is not from a run."""
    config, is_modern = model.config, huggingface.is_modern(model.config)
    header = {
        "library_name": "transformers", "pipeline_tag": "text-generation", "license": license,
        "tags": ["babygpt", "gpt2", *(["custom_code"] if is_modern else [])],
    }  # fmt: skip
    yaml = "\n".join(f"{key}: {json.dumps(value)}" for key, value in header.items() if value)
    eot, is_chat = model.tokenizer.decode([model.tokenizer.eot_id]), is_chat_tokenizer(model.tokenizer)
    trust = ", trust_remote_code=True" if is_modern else ""
    heads = counted(config["n_head"], "head")
    if config["n_kv_head"] not in (None, config["n_head"]):
        heads += f" ({config['n_kv_head']} for keys and values)"
    sections = [
        f"---\n{yaml}\n---",
        f"# {name}",
        f"A {'modern ' * is_modern}GPT with {num_params:,} parameters: {counted(config['n_layer'], 'layer')} of width "
        f"{config['n_embd']} with {heads}, a context of {config['block_size']:,} tokens, and a vocabulary of "
        f"{config['vocab_size']:,} tokens. "
        + (
            "It is a chat model."
            if is_chat
            else "It is a base model: it continues texts and does not follow instructions."
        ),
        *([] if run is None else run_sections(model, run)),
        "## Use",
        f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

path = "path/to/{name}"  # this directory, or USER/NAME on the Hugging Face Hub
tokenizer = AutoTokenizer.from_pretrained(path{trust})
model = AutoModelForCausalLM.from_pretrained(path{trust})
{CHAT_INPUTS if is_chat else BASE_INPUTS.format(eot=eot)}
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50, do_sample=True, top_k=50)[0]))
```""",
    ]
    if run is not None and not is_chat:
        sections.append(f"In training, every document began with `{eot}`, so a prompt should begin with it too.")
    return "\n\n".join(sections) + "\n"


def run_sections(model: Pretrained, run: Path) -> list[str]:
    """Return the sections about training and scores."""
    state = checkpoint.read_state(Path(model.source))
    launch = state["launches"][-1]
    settings, versions = launch["config"], launch["provenance"]
    facts = {
        "dataset": f"{Path(settings['data']['dataset']).name}, fingerprint `{state['data']['fingerprint']}`",
        "tokens": f"{state['tokens']:,} in {counted(state['step'], 'step')}",
        "recipe": f"{recipe_of(settings)}, optimizer {settings['optimizer']['name']}, seed "
        f"{settings['general']['seed']}",
        "code and hardware": f"BabyGPT at commit {versions['commit'] or 'unknown'}, Python {versions['python']}, torch "
        f"{versions['torch']}, {versions['ranks']} x {versions['device']}",
    }
    sections = ["## Training", "\n".join(f"- **{name}**: {value}" for name, value in facts.items())]
    if rows := score_rows(run, state["step"]):
        sections += ["## Scores", "\n".join(["| score | value | step | method |", "|---|---:|---:|---|", *rows])]
    if (run / "plot.png").exists():
        sections.append("![Losses, HellaSwag, learning rate, gradient norm and throughput](plot.png)")
    return sections


def recipe_of(settings: dict[str, dict]) -> str:
    """Return the preset, or the method and the initial model of finetuning."""
    if "chat" in settings:
        return f"{settings['chat']['method'].upper()} of `{Path(settings['general']['init_from']).name}`"
    return f"preset `{settings['general']['preset'] or 'none'}`"


def score_rows(run: Path, step: int) -> list[str]:
    """Return the rows of the table with the last scores up to this step."""
    found: dict[str, str] = {}  # by name of the score
    if (run / "log.csv").exists():
        [curves] = read_runs([run])
        examples = f", on {curves.num_examples:,} examples" if curves.num_examples else ""
        methods = {
            "validation loss": f"{loss_unit(curves.rows)}, mean over the validation split",
            "bits per byte": "validation loss per UTF-8 byte of the text",
            "HellaSwag": f"acc_norm as in build-nanogpt, with its standard error{examples}",
        }
        for row in curves.rows:
            row_step, _, loss, bits_per_byte, accuracy, error = scores(row, curves.num_examples)
            for name, value in zip(methods, (loss, bits_per_byte, accuracy), strict=True):
                if isinstance(value, float) and row_step <= step:
                    text = f"{value:.4f}" + (f" ± {error:.4f}" if name == "HellaSwag" and error is not None else "")
                    found[name] = f"| {name} | {text} | {row_step:,} | {methods[name]} |"
    if (run / "scores.csv").exists():
        for row_step, task, metric, value, error, n in read_scores(run / "scores.csv", step + 1):
            method = f"as in lm-evaluation-harness, on {n:,} examples"
            found[f"{task} {metric}"] = f"| {task} {metric} | {value:.4g} ± {error:.2g} | {row_step:,} | {method} |"
    return list(found.values())
