"""Export a model for other software: a directory that transformers loads, with a model card.

    python -m tools.export out/gpt2 exported/gpt2
    python -m tools.export out/modern exported/modern --license mit
    python -m tools.export out/gpt2 exported/gpt2 --gguf float16     # in addition, a file for llama.cpp

A classic model becomes a GPT2LMHeadModel. A modern one comes with its code, and is loaded with trust_remote_code=True.
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from tyro.conf import Positional

from babygpt import files
from babygpt.constraints import metavar, parse_arguments, required
from babygpt.errors import UserError, run
from babygpt.export import card, directory
from babygpt.export.gguf import check_gguf, write_gguf
from babygpt.pretrained import read_pretrained
from model import build_model, config_from_dict


@dataclass(frozen=True, kw_only=True)
class ExportArgs:
    """The command line: each field is a flag, and its comment is the help."""

    model: Annotated[Positional[str], required("MODEL")]  # run, checkpoint, or any other model that sample.py takes
    out: Annotated[Positional[Path], required("OUT")]  # directory to create
    license: Annotated[str | None, metavar("NAME", "none")] = None  # license in the model card, such as mit
    # also write model.gguf for llama.cpp, with weights of this type; only for classic models
    gguf: Annotated[Literal["float32", "float16"] | None, metavar("float32|float16", "no file")] = None


def main() -> None:
    args = parse_arguments(ExportArgs, "python -m tools.export", __doc__)
    if os.path.lexists(args.out) and not (args.out.is_dir() and not any(args.out.iterdir())):
        raise UserError(f"{args.out} exists and is not an empty directory. Use a new directory.")
    model = read_pretrained(args.model)
    if args.gguf:
        check_gguf(model)
    with torch.device("meta"):
        num_params = build_model(config_from_dict(model.config)).num_params()
    run_directory = Path(model.source).resolve().parent.parent if model.step is not None else None
    name = args.out.resolve().name
    text = card.model_card(model, num_params, name, args.license, run_directory)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{args.out} cannot be created ({error}). Use a different directory.") from None
    directory.write_model(model, args.out)
    files.write(args.out / "README.md", text.encode())
    if args.gguf:
        write_gguf(model, args.out / "model.gguf", name, args.gguf)
    if run_directory is not None and (run_directory / "plot.png").exists():
        shutil.copyfile(run_directory / "plot.png", args.out / "plot.png")
    print(f"{args.out}: {', '.join(sorted(path.name for path in args.out.iterdir()))}")


if __name__ == "__main__":
    run(main)
