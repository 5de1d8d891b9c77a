"""What a sweep found: its jobs by the metric they reached, best first."""

import math
from pathlib import Path

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from rich.text import Text


class SweepTable(Callback):
    """A callback of Hydra's. It sees the jobs run in this process, which with Hydra's own launcher is all of them."""

    def __init__(self) -> None:
        self.jobs: list[tuple[float, str, list[str]]] = []  # metric, folder, overrides

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_) -> None:
        value = job_return.return_value if job_return.status is JobStatus.COMPLETED else math.nan
        folder = job_return.hydra_cfg.hydra.runtime.output_dir
        self.jobs.append((math.inf if value is None else value, folder, list(job_return.overrides)))

    def on_multirun_end(self, config: DictConfig, **_) -> None:
        if not self.jobs:
            return
        same = set.intersection(*(set(overrides) for _, _, overrides in self.jobs))
        title = f"{len(self.jobs)} jobs, best first"
        table = Table("job", "overrides", config.metric, title=title, title_justify="left")
        ranked = sorted(self.jobs, key=lambda job: (math.isnan(job[0]), job[0]))
        for value, folder, overrides in ranked:
            own = Text(" ".join(text for text in overrides if text not in same), overflow="fold")
            told = "failed" if math.isnan(value) else "not measured" if math.isinf(value) else f"{value:.5f}"
            table.add_row(Path(folder).name, own, told)
        console = Console()
        console.print(table)
        if math.isfinite(ranked[0][0]):
            console.print(Text(f"best: {ranked[0][1]}"), soft_wrap=True)
