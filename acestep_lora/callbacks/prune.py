"""A trial of a search reports its validations to Optuna, which may end it."""

import lightning as L
import optuna


class Prune(L.Callback):
    """Reports `metric` by step and raises optuna.TrialPruned where the trial falls behind, which the first may."""

    def __init__(self, trial: optuna.Trial, metric: str) -> None:
        self.trial, self.metric = trial, metric

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or self.metric not in trainer.callback_metrics:
            return
        self.trial.report(float(trainer.callback_metrics[self.metric]), trainer.global_step)
        if self.trial.number and self.trial.should_prune():
            raise optuna.TrialPruned
