"""Report the progress of a run: log.csv, samples.txt, the console, the progress bar, plot.png and report.html."""

import shlex
import time
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from babygpt.console import console, counted, duration
from babygpt.training import checkpoint, run_dir
from babygpt.training.device import peak_flops, peak_memory_mib
from babygpt.training.distributed import Ranks
from babygpt.training.guard import StepStatus, check_status
from babygpt.training.log import Log, Row, SampleLog, ScoreLog, column, read_log
from babygpt.training.plots import plot, read_runs
from babygpt.training.report import write_report
from babygpt.training.tracker import Tracker

EVALUATION_COLUMNS = {"val_loss", "hellaswag"}  # columns that trigger an update of the plot and the report
SPIKE = 6.0  # losses with a larger z-score are reported
AVERAGED_STEPS = 1000  # length of the moving average of the time per step, longer than the usual period of the tasks
SLOW_STEP_MS = 10_000  # if the first step takes longer, its duration is printed


@dataclass
class Metrics:
    """Writes and prints everything that a run reports. Only the main rank writes files."""

    out: Path
    ranks: Ranks
    start: int  # step at which the run starts
    max_steps: int
    flops_per_token: int | None  # for MFU, a fraction of the bfloat16 peak; None: no MFU
    compare_every: int  # steps between comparisons of the weights of all ranks; 0: never
    console_every: int  # steps between lines on the console; 0: never
    tracker_name: str | None = None  # tensorboard or wandb
    settings: dict[str, Any] = field(default_factory=dict)  # for the tracker
    columns: tuple[str, ...] = ()  # of the log, for the values of a step's status

    def __post_init__(self) -> None:
        extra = (*self.columns, *(f"val_{name}" for name in self.columns))
        self.log = Log(self.out / "log.csv", self.start, extra) if self.ranks.is_main else None
        self.samples = SampleLog(self.out / "samples.txt", self.start) if self.ranks.is_main else None
        self.scores = ScoreLog(self.out / "scores.csv", self.start) if self.ranks.is_main else None
        self.tracker = None
        if self.tracker_name and self.ranks.is_main:
            self.tracker = Tracker(self.tracker_name, self.out, self.start, self.settings)
        disable = None if self.ranks.is_main else True  # None: disabled if stderr is not a terminal
        self.bar = tqdm(total=self.max_steps, initial=self.start, unit="step", disable=disable)
        self.last_record: float | None = None  # time of the last call to `record`
        self.seconds_per_step, self.averaged_steps = 0.0, 0  # moving average; includes tasks, excludes the first step

    def record(self, row: Row, status: StepStatus, ms: float) -> bool:
        """Check the status of a finished step that took `ms`; complete, write and print its row.

        Returns whether it drew a plot, which takes a second. Raises the ConfigError of `check_status`.
        """
        check_status(row["step"], status, self.compare_every, self.out)
        row |= {"loss": status.loss.item(), "grad_norm": status.grad_norm.item()}
        row |= zip(self.columns, status.values.tolist(), strict=True)
        row |= throughput(ms, row.pop("step_tokens"), self.flops_per_token, self.ranks)
        step, z_score, skipped = row["step"], status.z_score.item(), status.skip_update.item() > 0
        if z_score > SPIKE or skipped:
            console.info(
                f"step {step:>6} | the loss {row['loss']:.4f} is {z_score:.1f} standard deviations above the mean "
                + ("of recent losses; the update is skipped" if skipped else "of recent losses")
            )
        self.write(row)
        if EVALUATION_COLUMNS & row.keys():
            self.plot()
        self.bar.update()
        self.measure_time(time.monotonic())
        if step == self.start and ms > SLOW_STEP_MS:
            console.info(f"The first step took {duration(ms / 1e3)}")
        if self.console_every and step % self.console_every == 0:
            remaining = (self.max_steps - 1 - step) * self.seconds_per_step
            console.info(format_row(row) + (f" | {duration(remaining)} left" if remaining else ""))
        return bool(EVALUATION_COLUMNS & row.keys())

    def measure_time(self, now: float) -> None:
        """Update the moving average with the time since the last call, which covers a step and the tasks before it."""
        if self.last_record is not None:
            self.averaged_steps = min(self.averaged_steps + 1, AVERAGED_STEPS)
            self.seconds_per_step += (now - self.last_record - self.seconds_per_step) / self.averaged_steps
        self.last_record = now

    def write(self, row: Row) -> None:
        if self.log is not None:
            row["elapsed_s"] = self.log.elapsed_s()
            self.log.write(row)
        if self.tracker is not None:
            self.tracker.log(row)

    def write_scores(self, step: int, scores: list[Any]) -> None:
        """Print scores of `babygpt.evaluation.tasks`, and append them to scores.csv."""
        console.info(f"step {step:>6} | " + " | ".join(map(str, scores)))
        if self.scores is not None:
            self.scores.write([(step, *astuple(score)) for score in scores])
        if self.tracker is not None:
            self.tracker.log({"step": step} | {f"{score.task}/{score.metric}": score.value for score in scores})

    def plot(self) -> None:
        if self.ranks.is_main:
            runs = read_runs([self.out])
            plot(runs, self.out / "plot.png")
            write_report(runs, self.out / "report.html")

    def finish(self, step: int, stopped: bool) -> None:
        """Close the files, create the marker file, update plot and report, and print a summary or how to resume."""
        self.bar.close()
        if self.log is None:
            return
        self.log.close()
        (self.out / (run_dir.STOPPED if stopped else run_dir.FINISHED)).touch()
        self.plot()
        if stopped:
            console.info(f"Stopped and saved at step {step}. To resume: {run_dir.resume_command(self.out)}")
        else:
            console.info(self.summary())
        if self.tracker is not None:
            self.tracker.finish()

    def summary(self) -> str:
        """Return the time, the scores and the files of a finished run."""
        rows, lines = read_log(self.out / "log.csv"), []
        for name, title, best_of in (("val_loss", "validation loss", min), ("hellaswag", "HellaSwag acc_norm", max)):
            steps, values = column(rows, name)
            if values:
                best = best_of(values)
                lines.append(f"{title} {values[-1]:.4f} (best: {best:.4f} at step {steps[values.index(best)]:,})")
        if bits_per_byte := column(rows, "val_bpb")[1]:
            lines[0] += f", {bits_per_byte[-1]:.4f} bits per byte"
        saved = [path.relative_to(self.out) for path in checkpoint.list_checkpoints(self.out)[-1:]]
        files = ("log.csv", "scores.csv", "samples.txt", "plot.png", "report.html")
        names = [name for name in files if (self.out / name).exists()]
        elapsed = duration(rows[-1]["elapsed_s"] or 0.0)
        use = "chat" if run_dir.is_finetuning(self.out) else "sample"
        command = f"To {use}: {shlex.join(['python', f'{use}.py', str(self.out)])}"
        return "\n  ".join([
            f"Finished {counted(self.max_steps, 'step')} in {elapsed}", *lines,
            f"{self.out}: {', '.join(map(str, [*names, *saved]))}",
            *([command] if saved else []),
        ])  # fmt: skip


def throughput(ms: float, tokens: int, flops_per_token: int | None, ranks: Ranks) -> Row:
    """Return the columns for time, throughput, memory and MFU of a step of `tokens` tokens that took `ms`.

    MFU is missing if `flops_per_token` is None or the peak FLOPS of the device are unknown.
    """
    columns: Row = {"step_ms": ms, "memory_mib": peak_memory_mib(ranks.device), "tokens_per_s": tokens / ms * 1e3}
    if flops_per_token and (peak := peak_flops(ranks.device)):
        columns["mfu"] = columns["tokens_per_s"] * flops_per_token / (peak * ranks.world_size)
    return columns


def format_validation(row: Row) -> str:
    """Format the scores of a validation for the console."""
    scores = {name.removeprefix("val_"): value for name, value in row.items()}
    parts = [f"validation loss {scores.pop('loss'):.4f}"]
    if "bpb" in scores:
        parts.append(f"{scores.pop('bpb'):.4f} bits per byte")
    return " | ".join([*parts, *(f"{name} {value:.4f}" for name, value in scores.items())])


def format_row(row: Row) -> str:
    """Format the row of a step for the console."""
    mfu = f" | mfu {row['mfu']:.1%}" if "mfu" in row else ""
    return (
        f"step {row['step']:>6} | loss {row['loss']:.4f} | lr {row['lr']:.2e} | norm {row['grad_norm']:.3f} | "
        f"{row['step_ms']:,.0f} ms | {row['tokens_per_s']:,.0f} tokens/s{mfu}"
    )
