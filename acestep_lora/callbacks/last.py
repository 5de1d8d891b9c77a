"""The state a run ends with is validated, wherever it ends."""

import lightning as L


class LastValidation(L.Callback):
    """Lightning validates at the ends of every n-th epoch only; a run may end in another, or inside one."""

    def _is_last(self, trainer: L.Trainer) -> bool:
        return trainer.current_epoch + 1 == trainer.max_epochs

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.on_train_epoch_start(trainer, pl_module)  # which is not called when an epoch is resumed

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._is_last(trainer):
            trainer.check_val_every_n_epoch = 1

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_) -> None:
        if trainer.global_step == trainer.max_steps or trainer.should_stop:
            trainer.check_val_every_n_epoch, trainer.should_stop = 1, True
