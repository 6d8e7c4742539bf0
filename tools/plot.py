"""Plot one or more runs.

    python -m tools.plot out/gpt2 out/modern               # writes plot.png in the current directory
    python -m tools.plot out/* --out compare.png --x hours
    python -m tools.plot out/* --out compare.html          # a page like the report.html of a run

A PNG shows losses, HellaSwag accuracy, learning rate, gradient norm and throughput. For several runs, it shows only
moving averages. If their vocabularies differ, it shows only the validation loss, in bits per byte.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional

from babygpt.constraints import Positive, metavar, parse_arguments, required
from babygpt.errors import UserError, run
from babygpt.training.plots import Unit, plot, read_runs


@dataclass(frozen=True, kw_only=True)
class PlotArgs:
    """The command line: each field is a flag, and its comment is the help."""

    runs: Annotated[Positional[tuple[Path, ...]], required("RUN [RUN ...]")]  # run directories (out/NAME)
    out: Path = Path("plot.png")  # PNG or HTML file to write
    x: Unit = "steps"  # x-axis; hours: elapsed time, without the time between launches
    # average training losses, gradient norms and throughput over this number of steps
    smooth: Annotated[Positive | None, metavar("N", "1% of the steps")] = None


def main() -> None:
    args = parse_arguments(PlotArgs, "python -m tools.plot", __doc__)
    if not args.runs:
        raise UserError("No run given. Use python -m tools.plot out/NAME.")
    for path in args.runs:
        if not (path / "log.csv").exists():
            raise UserError(f"There is no run at {path}: it has no log.csv. Use a directory that train.py wrote.")
    if args.out.name in ("plot.png", "report.html") and (args.out.parent / "log.csv").exists():
        raise UserError(f"--out {args.out} is a file that the run itself writes. Use another name.")
    if args.out.suffix.lower() not in (".png", ".html"):
        raise UserError(f"--out {args.out} has another suffix than .png and .html. Use one of these.")
    runs = read_runs(list(args.runs), args.x)
    if args.out.suffix.lower() == ".html":
        from babygpt.training.report import write_report  # imports torch, which takes a second

        write_report(runs, args.out, args.x, args.smooth)
    else:
        plot(runs, args.out, args.x, args.smooth)
    print(args.out)


if __name__ == "__main__":
    run(main)
