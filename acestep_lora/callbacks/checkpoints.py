"""Saving: checkpoints to resume from, and adapters to use."""

import logging
import os
import re
import shutil
import signal
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import lightning as L
import torch

from acestep_lora import identity, interrupts
from acestep_lora.adapter_files import read
from acestep_lora.adapters import NAME
from acestep_lora.callbacks.ema import AdapterEMA
from acestep_lora.errors import UserError
from acestep_lora.export import FORMATS, Options, save_adapter
from acestep_lora.factors import parse
from acestep_lora.hashes import seal
from acestep_lora.interrupts import Interrupt, Interrupted
from acestep_lora.lowrank import Limits
from acestep_lora.numerics import NumericError

if TYPE_CHECKING:
    from acestep_lora.runs import Run

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


def remove(folder: Path) -> None:
    """Remove a checkpoint, which is whole as long as it has its name."""
    if folder.exists():
        hidden = folder.with_name(f".{folder.name}.old")
        os.replace(folder, hidden)
        shutil.rmtree(hidden)


def is_last_epoch(trainer: L.Trainer) -> bool:
    """Whether the run ends with the epoch in progress, as far as is known by now."""
    steps, epochs = trainer.global_step, trainer.current_epoch + 1
    return trainer.should_stop or steps == trainer.max_steps or epochs == trainer.max_epochs


class Checkpoints(L.Callback):
    """Writes `checkpoints/epoch_E-step_S/{state.ckpt, adapter/}`, `adapter/` (last), `adapter_best/` (by the metric).

    A checkpoint is taken where training can go on exactly: inside an epoch after an optimizer step, and at its end
    after validation. It gets its final name when everything in it is written and sealed, and the metrics of its step
    are logged, which Lightning does later; that of a run's last step when the run's adapters are written, too. At a
    signal it is taken at once, and Interrupted is raised. The average is exported when EMA is on.

    Args:
        metadata: what every exported file says about itself (see export.save_adapter).
        described: what is trained, kept in every checkpoint and compared with that of the one `resumed` (see identity).
        keep_last: how many of the latest checkpoints stay; keep_best: how many more by the metric. None keeps all.
    """

    def __init__(
        self,
        output_dir: Path,
        name: str,
        metadata: dict[str, str],
        described: identity.Identity,
        resumed: "Run",
        allow_changes: bool = False,
        metric: str = "val/loss",
        save_every_n_epochs: int | None = None,
        save_every_n_steps: int | None = None,
        keep_last: int | None = 2,
        keep_best: int = 1,
        comfyui_dora: str = "lora",
    ) -> None:
        self.output_dir, self.name, self.metadata, self.metric = Path(output_dir), name, metadata, metric
        self.described, self.resumed, self.allow_changes = described, resumed, allow_changes
        self.every_epochs, self.every_steps = save_every_n_epochs, save_every_n_steps
        self.keep_last, self.keep_best, self.comfyui_dora = keep_last, keep_best, comfyui_dora
        self.best: float | None = None
        self.best_step = 0
        self.last_value: float | None = None
        self.values: dict[str, float] = {}  # checkpoint folder -> metric at the time
        self.interrupt, self._signals = Interrupt(), ExitStack()
        self._step = 0
        self._due = False  # at the end of the epoch
        self._epoch_done = False  # whether the checkpoint being written is one of an epoch's end
        self._written: Path | None = None  # the checkpoint that has no final name yet

    def state_dict(self) -> dict:
        return {"best": self.best, "best_step": self.best_step, "values": self.values, "last_value": self.last_value}

    def load_state_dict(self, state: dict) -> None:
        self.best, self.best_step = state["best"], state["best_step"]
        self.values, self.last_value = state["values"], state["last_value"]

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict) -> None:
        checkpoint["identity"] = self.described
        checkpoint["epochs"] = trainer.current_epoch + self._epoch_done
        loops = checkpoint["loops"]["fit_loop"]
        # Counted anew: what Lightning restores is off by one after the second resume, and always after an epoch's end.
        done = {"ready": trainer.current_epoch + 1, "started": trainer.current_epoch + 1}
        done |= {"processed": trainer.current_epoch, "completed": trainer.current_epoch}
        loops["epoch_progress"] |= {"total": done, "current": dict(done)}
        if self._epoch_done:  # as after its last batch: the one place at an epoch's end that is resumed with the next
            loops["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1
            progress, many = loops["epoch_loop.batch_progress"], 10**9  # all of an epoch's, on any number of devices
            progress["total"]["completed"] -= 1
            progress["current"] = {"ready": many, "started": many, "processed": many, "completed": many - 1}

    # ------------------------------------------------------------ when

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Songs and devices are known, weights not yet read: time to refuse a checkpoint of another training."""
        self.described |= identity.of_songs(trainer.datamodule.songs)
        if self.resumed.checkpoint:
            identity.check(self.resumed.checkpoint, self.resumed.identity, self.described, self.allow_changes)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._step = trainer.global_step  # a resumed run's checkpoint is there already
        self._signals.enter_context(self.interrupt.listening())  # now: Lightning has just installed its own handlers

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._signals.close()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_) -> None:
        self._go_on(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_) -> None:
        if trainer.global_step == self._step:
            trainer.should_stop = False  # not inside an accumulation window: a Timer says so again after it
            return
        self._step = trainer.global_step
        self._due |= bool(self.every_steps) and self._step % self.every_steps == 0 or self._stopping(trainer)
        inside = not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        if inside and (self._due or self._step == trainer.max_steps or trainer.should_stop):
            self._write(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        last = is_last_epoch(trainer)
        if self._written is None or not last:
            self._due |= bool(self.every_epochs) and (trainer.current_epoch + 1) % self.every_epochs == 0
            if self._due or last or self._stopping(trainer):
                self._write(trainer, pl_module, epoch_done=True)
        if not last:
            self._go_on(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.export(trainer, pl_module, self.output_dir / "adapter", formats=FORMATS)
        best = self.output_dir / "adapter_best"
        if trainer.is_global_zero and best.is_dir():
            save_adapter(best, read(best), self._options(pl_module))
        self._bring_up_to_date(trainer)
        self._name(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if isinstance(exception, NumericError) and self._written is None:
            self._write(trainer, pl_module)  # nothing was learnt from the steps that were skipped
            self._name(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or self.metric not in trainer.callback_metrics:
            return
        self.last_value = float(trainer.callback_metrics[self.metric])
        if trainer.global_step and (self.best is None or self.last_value < self.best):
            self.best, self.best_step = self.last_value, trainer.global_step
            self.export(trainer, pl_module, self.output_dir / "adapter_best")

    def _stopping(self, trainer: L.Trainer) -> bool:
        return trainer.strategy.reduce_boolean_decision(self.interrupt.number is not None, all=False)

    # ------------------------------------------------------------ what

    def _write(self, trainer: L.Trainer, pl_module: L.LightningModule, epoch_done: bool = False) -> None:
        """Write a checkpoint under a hidden name."""
        pl_module.check_finite()
        self._due, self._epoch_done = False, epoch_done
        name = f"epoch_{trainer.current_epoch:04d}-step_{trainer.global_step:06d}"
        if self.last_value is not None:
            self.values[name] = self.last_value
        self._written = self.output_dir / "checkpoints" / f".{name}"
        try:
            # collective: every rank takes part, rank 0 writes
            trainer.save_checkpoint(self._written / "state.ckpt", weights_only=False)
            self.export(trainer, pl_module, self._written / "adapter")
        except (OSError, RuntimeError) as error:  # torch's own writer raises the latter when a disk is full
            shutil.rmtree(self._written, ignore_errors=True)
            raise UserError(
                f"The checkpoint of step {trainer.global_step} cannot be written ({error}): make room in "
                f"{self.output_dir}, then resume=auto goes on from the checkpoint before it."
            ) from error

    def _name(self, trainer: L.Trainer) -> Path | None:
        """Give what was written its final name, if anything was."""
        if self._written is None:
            return None
        written, self._written = self._written, None
        folder = written.with_name(written.name[1:])
        if trainer.is_global_zero:
            seal(written)
            remove(folder)  # of an earlier attempt at the same step
            os.replace(written, folder)
            self._rotate()
        return folder

    def _go_on(self, trainer: L.Trainer) -> None:
        """Unless the run was asked to stop."""
        folder = self._name(trainer)
        if folder and self._stopping(trainer):
            trainer.strategy.barrier()
            raise self._interrupted(trainer, folder)

    def _bring_up_to_date(self, trainer: L.Trainer) -> None:
        """A run that ends inside an epoch is validated after its last checkpoint was taken."""
        if trainer.is_global_zero and self._written is not None:
            path = self._written / "state.ckpt"
            if self.last_value is not None:
                self.values[self._written.name[1:]] = self.last_value
            state = torch.load(path, map_location="cpu", weights_only=True)
            if state["callbacks"][self.state_key] != self.state_dict():
                state["callbacks"][self.state_key] = self.state_dict()
                torch.save(state, path)

    def _interrupted(self, trainer: L.Trainer, folder: Path) -> Interrupted:
        number = self.interrupt.number or 0
        message = f"stopped after step {trainer.global_step} and saved {folder}."
        if trainer.is_global_zero and number == getattr(signal, "SIGUSR1", None) and interrupts.requeue():
            message += " Slurm runs the job again, which goes on from there."
        else:
            message += f" To go on: the same command with output_dir={self.output_dir} resume=auto"
        return Interrupted(number, message)

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
            remove(folder)
            self.values.pop(folder.name, None)

    def verdict(self) -> str:
        """One line on which of the two adapters to use."""
        if self.best is None or self.last_value is None:
            return f"No {self.metric} was measured: adapter/ is the last state."
        if self.best < self.last_value:
            better = f"{self.metric} {self.best:.5f} at step {self.best_step}"
            return f"adapter_best/ ({better}) is better than adapter/ ({self.last_value:.5f})."
        return f"adapter/ is also the best ({self.metric} {self.last_value:.5f})."
