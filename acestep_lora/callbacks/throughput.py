"""How fast training runs: latent frames per second, read from the device only where metrics are logged anyway."""

import time

import lightning as L

from acestep_lora.data.items import Batch


class Throughput(L.Callback):
    """Logs `perf/frames_per_s` (real frames, padding not counted)."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._restart(trainer)

    def _restart(self, trainer: L.Trainer) -> None:
        self.frames, self.since, self.step = 0, time.monotonic(), trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs, batch: Batch, *_) -> None:
        self.frames = self.frames + batch.frames.sum()
        if trainer.global_step - self.step >= trainer.log_every_n_steps:
            frames = trainer.strategy.reduce(self.frames, reduce_op="sum")
            pl_module.log("perf/frames_per_s", float(frames) / (time.monotonic() - self.since))
            self._restart(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if hasattr(self, "since"):
            self._restart(trainer)  # time spent validating is not training time
