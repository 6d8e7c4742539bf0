"""Draw one or several runs, from their log.csv alone.

    python -m tools.plot out/gpt2                          # writes out/gpt2/plot.png
    python -m tools.plot out/gpt2 out/modern --out compare.png --x tokens

The picture has losses, HellaSwag, learning rate, gradient norm and speed.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from babygpt.constraints import parse_arguments
from babygpt.errors import UserError, run
from babygpt.training.plots import plot


@dataclass(frozen=True, kw_only=True)
class PlotArgs:
    """Draw one or several runs into a PNG."""

    runs: Positional[tuple[Path, ...]]  # run directories (out/NAME)
    out: Path | None = None  # the picture; None: plot.png in the directory of the first run
    x: Literal["steps", "tokens"] = "steps"  # what the losses stand against


def main() -> None:
    args = parse_arguments(PlotArgs, "python -m tools.plot", __doc__)
    if not args.runs:
        raise UserError("name at least one run: python -m tools.plot out/NAME")
    for path in args.runs:
        if not (path / "log.csv").exists():
            raise UserError(f"there is no run at {path}: it has no log.csv.")
    out = args.out or args.runs[0] / "plot.png"
    plot(list(args.runs), out, args.x)
    print(out)


if __name__ == "__main__":
    run(main)
