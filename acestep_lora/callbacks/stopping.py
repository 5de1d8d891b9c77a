"""What ends a run before its planned end: no progress, or a loss low enough."""

import logging

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason

log = logging.getLogger(__name__)


class EarlyStop(EarlyStopping):
    """Ends a run after `patience` validations without a new best of `metric`, or once that is below `target_loss`.

    An improvement by less than `min_delta` is none. A resumed run goes on counting where it stopped, by the patience
    it is given now.
    """

    def __init__(
        self, metric: str, patience: int | None = None, min_delta: float = 0.0, target_loss: float | None = None
    ) -> None:
        endless = 10**9
        super().__init__(
            metric,
            min_delta,
            endless if patience is None else patience,
            stopping_threshold=target_loss,
            check_on_train_epoch_end=False,
        )

    @property
    def over(self) -> bool:
        """Whether what was seen so far ends the run."""
        target = self.stopping_threshold
        return self.wait_count >= self.patience or target is not None and bool(self.best_score < target)

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(
            state | {"patience": self.patience, "stopping_reason": EarlyStoppingReason.NOT_STOPPED.value}
        )

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.stopping_reason is not EarlyStoppingReason.NOT_STOPPED:
            why = self.stopping_reason_message.removesuffix(" Signaling Trainer to stop.")
            log.info("stopped early at step %d: %s", trainer.global_step, why)
