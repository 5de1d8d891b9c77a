"""Saving: checkpoints to resume from, and adapters to use."""

import logging
import os
import re
import shutil
from contextlib import nullcontext
from pathlib import Path

import lightning as L

from acestep_lora.adapter_files import read
from acestep_lora.adapters import NAME
from acestep_lora.callbacks.ema import AdapterEMA
from acestep_lora.export import FORMATS, Options, save_adapter
from acestep_lora.factors import parse
from acestep_lora.lowrank import Limits

log = logging.getLogger(__name__)

QUICK = ("peft", "lycoris", "diffusers")
"""Formats written at every checkpoint. ComfyUI's, which for a DoRA takes minutes, is written at the end."""

MAX_RANK = 256
"""Of a DoRA written as LoRA for ComfyUI: exact on small models, and on a 2B one a file of a bearable size."""

_FOLDER = re.compile(r"epoch_(\d+)-step_(\d+)")


def checkpoint_folders(output_dir: Path) -> list[Path]:
    """Finished checkpoint folders of a run, oldest first."""
    found = [path for path in (output_dir / "checkpoints").glob("epoch_*") if _FOLDER.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(_FOLDER.fullmatch(path.name)[2]))


class Checkpoints(L.Callback):
    """Writes `checkpoints/epoch_E-step_S/{state.ckpt, adapter/}`, `adapter/` (last), `adapter_best/` (by the metric).

    A folder gets its final name only when everything in it is written. The average is exported when EMA is on.

    Args:
        metadata: what every exported file says about itself (see export.save_adapter).
        keep_last: how many of the latest checkpoints stay; keep_best: how many more by the metric. None keeps all.
    """

    def __init__(
        self,
        output_dir: Path,
        name: str,
        metadata: dict[str, str],
        metric: str = "val/loss",
        save_every_n_epochs: int | None = None,
        save_every_n_steps: int | None = None,
        keep_last: int | None = 2,
        keep_best: int = 1,
        comfyui_dora: str = "lora",
    ) -> None:
        self.output_dir, self.name, self.metadata, self.metric = Path(output_dir), name, metadata, metric
        self.every_epochs, self.every_steps = save_every_n_epochs, save_every_n_steps
        self.keep_last, self.keep_best, self.comfyui_dora = keep_last, keep_best, comfyui_dora
        self.best: float | None = None
        self.best_step = 0
        self.last_value: float | None = None
        self.values: dict[str, float] = {}  # checkpoint folder -> metric at the time
        self._saved_step = -1

    def state_dict(self) -> dict:
        return {"best": self.best, "best_step": self.best_step, "values": self.values, "last_value": self.last_value}

    def load_state_dict(self, state: dict) -> None:
        self.best, self.best_step = state["best"], state["best_step"]
        self.values, self.last_value = state["values"], state["last_value"]

    # ------------------------------------------------------------ when

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._saved_step = trainer.global_step  # a resumed run's checkpoint is there already

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_) -> None:
        step = trainer.global_step
        if self.every_steps and step % self.every_steps == 0 and step != self._saved_step and step:
            self.save(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.every_epochs and (trainer.current_epoch + 1) % self.every_epochs == 0:
            self.save(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.save(trainer, pl_module)
        self.export(trainer, pl_module, self.output_dir / "adapter", formats=FORMATS)
        best = self.output_dir / "adapter_best"
        if trainer.is_global_zero and best.is_dir():
            save_adapter(best, read(best), self._options(pl_module))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or self.metric not in trainer.callback_metrics:
            return
        self.last_value = float(trainer.callback_metrics[self.metric])
        if trainer.global_step and (self.best is None or self.last_value < self.best):
            self.best, self.best_step = self.last_value, trainer.global_step
            self.export(trainer, pl_module, self.output_dir / "adapter_best")

    # ------------------------------------------------------------ what

    def save(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step == self._saved_step:
            return
        self._saved_step = trainer.global_step
        folder = self.output_dir / "checkpoints" / f"epoch_{trainer.current_epoch:04d}-step_{trainer.global_step:06d}"
        if self.last_value is not None:
            self.values[folder.name] = self.last_value
        unfinished = folder.with_name(f".{folder.name}")
        trainer.save_checkpoint(
            unfinished / "state.ckpt", weights_only=False
        )  # collective: every rank takes part, rank 0 writes
        self.export(trainer, pl_module, unfinished / "adapter")
        if trainer.is_global_zero:
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(unfinished, folder)
            self._rotate()

    def export(self, trainer: L.Trainer, pl_module: L.LightningModule, folder: Path, formats=QUICK) -> None:
        """Write the adapter as it is now, averaged when EMA is on; all formats only where they are worth their time."""
        peft = getattr(pl_module.dit, "peft_config", None)
        if peft is None:
            return
        ema = next((callback for callback in trainer.callbacks if isinstance(callback, AdapterEMA)), None)
        with ema.applied(pl_module) if ema else nullcontext():
            state = {name: tensor.detach().cpu().clone() for name, tensor in pl_module.adapter_state().items()}
        if not trainer.is_global_zero:
            return
        weights = parse(state, peft[NAME].to_dict(), self.metadata)
        save_adapter(folder, weights, self._options(pl_module), formats)

    def _options(self, pl_module: L.LightningModule) -> Options:
        return Options(
            self.name, pl_module.base_weight, comfyui_dora=self.comfyui_dora, limits=Limits(max_rank=MAX_RANK)
        )

    def _rotate(self) -> None:
        folders = checkpoint_folders(self.output_dir)
        if self.keep_last is None:
            return
        keep = set(folders[-max(1, self.keep_last) :])
        scored = [folder for folder in folders if folder.name in self.values]
        keep |= set(sorted(scored, key=lambda folder: self.values[folder.name])[: self.keep_best])
        for folder in set(folders) - keep:
            shutil.rmtree(folder)
            self.values.pop(folder.name, None)

    def verdict(self) -> str:
        """One line on which of the two adapters to use."""
        if self.best is None or self.last_value is None:
            return f"No {self.metric} was measured: adapter/ is the last state."
        if self.best < self.last_value:
            better = f"{self.metric} {self.best:.5f} at step {self.best_step}"
            return f"adapter_best/ ({better}) is better than adapter/ ({self.last_value:.5f})."
        return f"adapter/ is also the best ({self.metric} {self.last_value:.5f})."
