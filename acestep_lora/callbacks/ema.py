"""An exponential moving average of the trained weights, checkpointed beside the weights themselves."""

from collections.abc import Iterator
from contextlib import contextmanager

import lightning as L
import torch

from acestep_lora.errors import UserError
from acestep_lora.sharding import dealt_like, local, whole


class AdapterEMA(L.Callback):
    """Keeps average <- decay * average + (1 - decay) * weights after every optimizer step; validation uses it.

    decay is in [0, 1); step n uses min(decay, (1 + n) / (10 + n)), so a short run's average leaves its start.
    """

    def __init__(self, decay: float) -> None:
        if not 0 <= decay < 1:
            raise UserError(f"ema.decay must be in [0, 1), got {decay}.")
        self.decay, self.steps = decay, 0
        self.average: dict[str, torch.Tensor] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for name, weight in pl_module.trainable().items():
            kept = self.average.get(name)
            self.average[name] = weight.detach().clone() if kept is None else dealt_like(kept.to(weight.device), weight)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_) -> None:
        if trainer.global_step == self.steps:
            return
        self.steps = trainer.global_step
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        weights = [local(weight.detach()) for weight in pl_module.trainable().values()]
        torch._foreach_lerp_([local(average) for average in self.average.values()], weights, 1 - decay)

    @contextmanager
    def applied(self, pl_module: L.LightningModule) -> Iterator[None]:
        """The model with averaged weights inside the block."""
        self._swap(pl_module)
        try:
            yield
        finally:
            self._swap(pl_module)

    def _swap(self, pl_module: L.LightningModule) -> None:
        for name, weight in pl_module.trainable().items():
            weight, average = local(weight.detach()), local(self.average[name])
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.average:
            self._swap(pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.average:
            self._swap(pl_module)

    def state_dict(self) -> dict:
        return {"average": {name: whole(average) for name, average in self.average.items()}, "steps": self.steps}

    def load_state_dict(self, state: dict) -> None:
        self.average, self.steps = state["average"], state["steps"]
