"""What a sweep found: its jobs by the metric they reached, as a table, as a picture and as a page."""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from rich.console import Console
from rich.table import Table
from rich.text import Text

from acestep_lora.pages import Section, write_page


@dataclass(frozen=True)
class Trial:
    """A job: its folder, what was set in it (key -> value as typed), and the metric or why there is none."""

    folder: Path
    settings: Mapping[str, str]
    metric: float | None = None
    note: str = ""

    @property
    def told(self) -> str:
        return self.note if self.metric is None else f"{self.metric:.5f}"


def ranked(trials: Sequence[Trial]) -> list[Trial]:
    """Best first, those without a metric last."""
    return sorted(trials, key=lambda trial: (trial.metric is None, trial.metric or 0))


def varied(trials: Sequence[Trial]) -> list[str]:
    """The keys that are not the same in all trials."""
    keys = dict.fromkeys(key for trial in trials for key in trial.settings)
    return [key for key in keys if len({trial.settings.get(key) for trial in trials}) > 1]


def print_table(trials: Sequence[Trial], metric: str) -> None:
    keys = varied(trials)
    table = Table("job", "overrides", metric, title=f"{len(trials)} jobs, best first", title_justify="left")
    for trial in ranked(trials):
        own = " ".join(f"{key}={trial.settings[key]}" for key in keys if key in trial.settings)
        table.add_row(trial.folder.name, Text(own, overflow="fold"), trial.told)
    console = Console()
    console.print(table)
    if (best := ranked(trials)[0]).metric is not None:
        console.print(Text(f"best: {best.folder}"), soft_wrap=True)


def write_sweep_page(folder: Path, trials: Sequence[Trial], metric: str, note: str = "") -> Path:
    """`folder`/sweep.html: every job in one picture and one table."""
    keys = varied(trials)
    rows = [[trial.folder.name, *(trial.settings.get(key, "") for key in keys), trial.told] for trial in ranked(trials)]
    best = ranked(trials)[0]
    facts = {"jobs": str(len(trials)), "measured": str(sum(trial.metric is not None for trial in trials))}
    facts |= {f"best {metric}": best.told, "best job": best.folder.name} if best.metric is not None else {}
    picture = draw_parallel(trials, metric)
    sections = [Section("Jobs, best first", note, table=[["job", *keys, metric], *rows])]
    if picture:
        sections.insert(0, Section("What was set, and what came of it", figures={"a line for each job": picture}))
    return write_page(folder / "sweep.html", f"Sweep {folder.name}", facts, sections)


# ---------------------------------------------------------------- the picture


def draw_parallel(trials: Sequence[Trial], metric: str) -> bytes | None:
    """Parallel coordinates, a PNG: an axis for each key that varies and one for the metric, a line for each job.

    The better a job, the darker its line. None where nothing was varied or measured.
    """
    measured, keys = ranked([trial for trial in trials if trial.metric is not None]), varied(trials)
    if not measured or not keys:
        return None
    columns = [[trial.settings.get(key, "") for trial in measured] for key in keys]
    axes = [place(values) for values in (*columns, [f"{trial.metric:.6g}" for trial in measured])]
    figure = Figure(figsize=(max(6, 2.2 * len(axes)), 4.5), layout="constrained")
    board = figure.subplots()
    for rank, heights in reversed(list(enumerate(zip(*(heights for heights, _ in axes), strict=True)))):
        share = rank / max(1, len(measured) - 1)
        board.plot(heights, color=(0.75 - 0.1 * (1 - share), 0.35 + 0.4 * share, 0.24 + 0.5 * share), lw=3 - 2 * share)
    for x, (_, ticks) in enumerate(axes):
        board.axvline(x, color="0.6", lw=0.8)
        for height, label in ticks.items():
            board.annotate(label, (x, height), (4, 2), textcoords="offset points", fontsize=8, color="0.25")
    board.set_xticks(range(len(axes)), [*keys, metric], fontsize=9)
    board.yaxis.set_major_locator(NullLocator())
    board.spines[:].set_visible(False)
    board.margins(0.04, 0.06)
    png = io.BytesIO()
    figure.savefig(png, dpi=100, format="png")
    return png.getvalue()


def place(values: Sequence[str]) -> tuple[list[float], dict[float, str]]:
    """Heights of values on an axis from 0 to 1, and its ticks. Numbers a factor of ten apart lie by their logarithm."""
    try:
        numbers = [float(value) for value in values]
    except ValueError:
        kinds = {kind: i for i, kind in enumerate(sorted(set(values)))}
        top = max(1, len(kinds) - 1)
        return [kinds[value] / top for value in values], {i / top: kind for kind, i in kinds.items()}
    low, high = min(numbers), max(numbers)
    logarithmic = low > 0 and high / low >= 10
    scaled = [math.log(number) if logarithmic else number for number in numbers]
    span = (max(scaled) - min(scaled)) or 1.0
    heights = [(number - min(scaled)) / span for number in scaled]
    few = len(set(numbers)) <= 6
    ticks = dict(zip(heights, values, strict=True)) if few else {0.0: f"{low:.4g}", 1.0: f"{high:.4g}"}
    return heights, ticks
