"""What a run reports: log.csv, samples.txt, the console, the progress bar and plot.png."""

from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from babygpt.console import console
from babygpt.training.device import peak_flops, peak_memory_mib
from babygpt.training.distributed import Ranks
from babygpt.training.guard import StepStatus, check_status
from babygpt.training.log import Log, Row, Samples
from babygpt.training.plots import plot

SCORES = {"val_loss", "hellaswag"}  # columns for which the plot is redrawn
SPIKE = 6.0  # a loss this many standard deviations above recent losses is reported


@dataclass
class Metrics:
    """Everything that a run reports. Only the main rank writes files and prints."""

    out: Path
    ranks: Ranks
    start: int  # step at which the run starts
    max_steps: int
    batch_tokens: int
    flops_per_token: int | None  # for MFU, whose peak is bfloat16's; None: unknown
    compare_every: int  # steps after which the weights of the ranks are compared
    console_every: int  # steps after which a line is printed; 0: never

    def __post_init__(self) -> None:
        self.log = Log(self.out / "log.csv", self.start) if self.ranks.is_main else None
        self.samples = Samples(self.out / "samples.txt", self.start) if self.ranks.is_main else None
        disable = None if self.ranks.is_main else True  # None: unless stderr is a terminal
        self.bar = tqdm(total=self.max_steps, initial=self.start, unit="step", disable=disable)

    def record(self, row: Row, status: StepStatus, ms: float) -> bool:
        """Check the status of a finished step that took `ms`; complete, write and print its row.

        Returns whether a plot was drawn, which takes a second. ConfigError if the status is that of a broken run.
        """
        check_status(row["step"], status, self.compare_every)
        row |= {"loss": status.loss.item(), "grad_norm": status.grad_norm.item()}
        row |= throughput(ms, self.batch_tokens, self.flops_per_token, self.ranks)
        step, z_score, skipped = row["step"], status.z_score.item(), status.skip_update.item() > 0
        if z_score > SPIKE or skipped:
            console.info(
                f"step {step:>6} | the loss of {row['loss']:.4f} is {z_score:.1f} standard deviations above recent "
                + ("losses: its update is skipped" if skipped else "losses")
            )
        self.write(row)
        if SCORES & row.keys():
            self.plot()
        self.bar.update()
        if self.console_every and step % self.console_every == 0:
            console.info(console_line(row))
        if step == self.start + 10:
            hours = row["step_ms"] / 3.6e6 * (self.max_steps - step)
            console.info(f"about {hours:.1f} hours of training remain, not counting evaluations")
        return bool(SCORES & row.keys())

    def write(self, row: Row) -> None:
        if self.log is not None:
            self.log.write(row)

    def plot(self) -> None:
        if self.ranks.is_main:
            plot([self.out], self.out / "plot.png")

    def close(self) -> None:
        self.bar.close()
        if self.log is not None:
            self.log.close()


def throughput(ms: float, tokens: int, flops_per_token: int | None, ranks: Ranks) -> Row:
    """Return the columns for time, throughput, memory and MFU of a step of `tokens` that took `ms`.

    There is no MFU without FLOPs per token, or if the peak of the device is unknown.
    """
    columns: Row = {"step_ms": ms, "memory_mib": peak_memory_mib(ranks.device), "tokens_per_s": tokens / ms * 1e3}
    if flops_per_token and (peak := peak_flops(ranks.device)):
        columns["mfu"] = columns["tokens_per_s"] * flops_per_token / (peak * ranks.world_size)
    return columns


def console_line(row: Row) -> str:
    """Return the line of a step for the console."""
    mfu = f" | mfu {row['mfu']:.1%}" if "mfu" in row else ""
    return (
        f"step {row['step']:>6} | loss {row['loss']:.4f} | lr {row['lr']:.2e} | norm {row['grad_norm']:.3f} | "
        f"{row['step_ms']:,.0f} ms | {row['tokens_per_s']:,.0f} tokens/s{mfu}"
    )
