"""A sweep's jobs, each written down as it ends, in whichever process it ran; shown when all have ended."""

import json
import math
from pathlib import Path

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from acestep_lora.hashes import write_atomic

FILE = "job.json"


class SweepTable(Callback):
    """A callback of Hydra's: `job.json` in every job's folder, then sweep.html and a table of all of them."""

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_) -> None:
        if job_return.hydra_cfg.hydra.mode != RunMode.MULTIRUN:
            return
        value = job_return.return_value if job_return.status is JobStatus.COMPLETED else math.nan
        file = Path(job_return.hydra_cfg.hydra.runtime.output_dir) / FILE
        failed = value is not None and not math.isfinite(value)
        if failed and file.exists():
            return  # refused, because an earlier job's result is there
        job = {
            "settings": dict(text.lstrip("+").split("=", 1) for text in job_return.overrides if "=" in text),
            "metric": None if failed else value,
            "note": "failed" if failed else "not measured" if value is None else "",
        }
        write_atomic(file, json.dumps(job, ensure_ascii=False, indent=1).encode())

    def on_multirun_end(self, config: DictConfig, **_) -> None:
        from acestep_lora import trials

        folder = Path(config.hydra.sweep.dir)
        files = sorted(folder.glob(f"*/{FILE}"), key=lambda file: (len(file.parent.name), file.parent.name))
        jobs = [trials.Trial(file.parent, **json.loads(file.read_text(encoding="utf-8"))) for file in files]
        if jobs:
            trials.print_table(jobs, config.metric)
            trials.write_sweep_page(folder, jobs, config.metric)
