"""Plot one or more runs from their log.csv files.

    python -m tools.plot out/gpt2                          # writes out/gpt2/plot.png
    python -m tools.plot out/gpt2 out/modern --out compare.png --x tokens

The plot shows losses, HellaSwag accuracy, learning rate, gradient norm and throughput.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional

from babygpt.constraints import metavar, parse_arguments, required
from babygpt.errors import UserError, run
from babygpt.training.plots import plot


@dataclass(frozen=True, kw_only=True)
class PlotArgs:
    """The command line: each field is a flag, and its comment is the help."""

    runs: Annotated[Positional[tuple[Path, ...]], required("RUN [RUN ...]")]  # run directories (out/NAME)
    # PNG file to write
    out: Annotated[Path | None, metavar("PATH", "plot.png in the first run directory")] = None
    x: Literal["steps", "tokens"] = "steps"  # x-axis of the losses


def main() -> None:
    args = parse_arguments(PlotArgs, "python -m tools.plot", __doc__)
    if not args.runs:
        raise UserError("No run given. Use python -m tools.plot out/NAME.")
    for path in args.runs:
        if not (path / "log.csv").exists():
            raise UserError(f"There is no run at {path}: it has no log.csv. Use a directory that train.py wrote.")
    out = args.out or args.runs[0] / "plot.png"
    plot(list(args.runs), out, args.x)
    print(out)


if __name__ == "__main__":
    run(main)
