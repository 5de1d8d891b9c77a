"""Where metrics go: metrics.csv always, W&B and TensorBoard by choice."""

import csv
import io
import logging
import netrc
import os
import re
from importlib.util import find_spec
from pathlib import Path

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from acestep_lora.errors import UserError
from acestep_lora.hashes import write_atomic
from acestep_lora.untrusted import told

log = logging.getLogger(__name__)


class MetricsCSV(Logger):
    """`metrics.csv`: one row per logged step. A resumed run goes on in the same file, no step doubled or lost.

    Args:
        resumed_step: optimizer steps of the checkpoint that is resumed; rows behind it are written again.
    """

    def __init__(self, folder: Path, resumed_step: int | None = None) -> None:
        super().__init__()
        self.path = Path(folder) / "metrics.csv"
        self.columns, rows = ["step"], []
        if self.path.is_file():
            with told(f"{self.path} is damaged, move it away"), self.path.open(newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                self.columns = list(reader.fieldnames or self.columns)
                self.columns.index("step")
                rows = [row for row in reader if (row["step"] or "").isdecimal() and None not in (*row, *row.values())]
        self._rewrite([row for row in rows if resumed_step is None or int(row["step"]) <= resumed_step])

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, *args, **kwargs) -> None:
        pass  # config.yaml has them all

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        new = [name for name in metrics if name not in self.columns]
        if new:
            with self.path.open(newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
            self.columns += new
            self._rewrite(rows)
        if step != self._last_step:
            self._last_step, self._last_row = step, {"step": step}
            self._last_at = self.path.stat().st_size
        self._last_row |= {name: repr(float(value)) for name, value in metrics.items()}
        with self.path.open("r+", newline="", encoding="utf-8") as file:
            file.seek(self._last_at)
            self._writer(file).writerow(self._last_row)
            file.truncate()  # afterwards: a process killed in between has lost nothing

    def _writer(self, file) -> csv.DictWriter:
        return csv.DictWriter(file, self.columns, lineterminator="\n")

    def _rewrite(self, rows: list[dict]) -> None:
        head, last = rows[:-1], rows[-1:]
        text = io.StringIO()
        self._writer(text).writeheader()
        self._writer(text).writerows(head)
        self._last_at = len(text.getvalue().encode())
        self._writer(text).writerows(last)
        write_atomic(self.path, text.getvalue().encode())
        self._last_row = dict(last[0]) if last else {}
        self._last_step = int(last[0]["step"]) if last else None


def wandb_logger(project: str, name: str, save_dir: Path, group: str | None = None) -> WandbLogger:
    """W&B, online when credentials are there, else offline with one line that says so; it never asks."""
    mode = os.environ.get("WANDB_MODE")
    offline = mode in ("offline", "disabled", "dryrun") or (mode is None and not _credentials())
    if offline and mode is None:
        log.info(
            "W&B: no credentials, logging offline (`wandb login` before a run or `wandb sync` after it uploads it)"
        )
    os.environ.setdefault("WANDB_SILENT", "true")
    options = {"project": project, "name": name, "save_dir": str(save_dir), "group": group}
    if not offline:
        import wandb

        try:
            logger = WandbLogger(**options, settings=wandb.Settings(init_timeout=30))
            logger.experiment  # noqa: B018 - connects now, while there is still a choice
            return logger
        except wandb.Error as error:
            log.warning("W&B cannot be reached (%s), logging offline", str(error).split("\n")[0])
            wandb.teardown()
    return WandbLogger(**options, offline=True)


def tensorboard_logger(**options) -> TensorBoardLogger:
    """Lightning's, which would not say which extra it needs."""
    if find_spec("tensorboard") is None:
        raise UserError('logger=tensorboard needs tensorboard: pip install "acestep-lora[tensorboard]".')
    return TensorBoardLogger(**options)


def upload(loggers: list[Logger], folder: Path, name: str) -> None:
    """Config, dataset and adapter of a finished run as a W&B artifact; an offline run keeps it for `wandb sync`."""
    import wandb

    for logger in loggers:
        if isinstance(logger, WandbLogger) and os.environ.get("WANDB_MODE") != "disabled":
            artifact = wandb.Artifact(re.sub(r"[^\w.-]+", "-", name), type="adapter")
            for file in ("config.yaml", "dataset.json"):
                artifact.add_file(str(folder / file))
            if (folder / "adapter").is_dir():
                artifact.add_dir(str(folder / "adapter"), name="adapter")
            logger.experiment.log_artifact(artifact)


def _credentials() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0]
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
