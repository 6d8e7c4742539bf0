"""Report the progress of a run: log.csv, samples.txt, the console, the progress bar and plot.png."""

from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from babygpt.console import console
from babygpt.training.device import peak_flops, peak_memory_mib
from babygpt.training.distributed import Ranks
from babygpt.training.guard import StepStatus, check_status
from babygpt.training.log import Log, Row, SampleLog
from babygpt.training.plots import plot

EVALUATION_COLUMNS = {"val_loss", "hellaswag"}  # columns for which the plot is redrawn
SPIKE = 6.0  # losses with a larger z-score are reported


@dataclass
class Metrics:
    """Writes and prints everything that a run reports. Only the main rank writes files."""

    out: Path
    ranks: Ranks
    start: int  # step at which the run starts
    max_steps: int
    batch_tokens: int
    flops_per_token: int | None  # for MFU, a fraction of the bfloat16 peak; None: no MFU
    compare_every: int  # steps between comparisons of the weights of all ranks; 0: never
    console_every: int  # steps between lines on the console; 0: never

    def __post_init__(self) -> None:
        self.log = Log(self.out / "log.csv", self.start) if self.ranks.is_main else None
        self.samples = SampleLog(self.out / "samples.txt", self.start) if self.ranks.is_main else None
        disable = None if self.ranks.is_main else True  # None: disabled if stderr is not a terminal
        self.bar = tqdm(total=self.max_steps, initial=self.start, unit="step", disable=disable)

    def record(self, row: Row, status: StepStatus, ms: float) -> bool:
        """Check the status of a finished step that took `ms`; complete, write and print its row.

        Returns whether it drew a plot, which takes a second. Raises the ConfigError of `check_status`.
        """
        check_status(row["step"], status, self.compare_every, self.out)
        row |= {"loss": status.loss.item(), "grad_norm": status.grad_norm.item()}
        row |= throughput(ms, self.batch_tokens, self.flops_per_token, self.ranks)
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
        if self.console_every and step % self.console_every == 0:
            console.info(format_row(row))
        if step == self.start + 10:
            minutes = row["step_ms"] / 6e4 * (self.max_steps - step)
            remaining = f"{minutes / 60:.1f} hours" if minutes > 99 else f"{minutes:.1f} minutes"
            console.info(f"About {remaining} of training remain, not counting evaluations")
        return bool(EVALUATION_COLUMNS & row.keys())

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
    """Return the columns for time, throughput, memory and MFU of a step of `tokens` tokens that took `ms`.

    MFU is missing if `flops_per_token` is None or the peak FLOPS of the device are unknown.
    """
    columns: Row = {"step_ms": ms, "memory_mib": peak_memory_mib(ranks.device), "tokens_per_s": tokens / ms * 1e3}
    if flops_per_token and (peak := peak_flops(ranks.device)):
        columns["mfu"] = columns["tokens_per_s"] * flops_per_token / (peak * ranks.world_size)
    return columns


def format_row(row: Row) -> str:
    """Format the row of a step for the console."""
    mfu = f" | mfu {row['mfu']:.1%}" if "mfu" in row else ""
    return (
        f"step {row['step']:>6} | loss {row['loss']:.4f} | lr {row['lr']:.2e} | norm {row['grad_norm']:.3f} | "
        f"{row['step_ms']:,.0f} ms | {row['tokens_per_s']:,.0f} tokens/s{mfu}"
    )
