"""A run that is stopped, anywhere and by anything, goes on as if it had not been; into another training it does not."""

import csv
import os
import signal

import lightning as L
import pytest

from acestep_lora import runs
from acestep_lora.interrupts import Interrupted

STEPS = ("trainer.max_epochs=3", "trainer.accumulate_grad_batches=2", "trainer.check_val_every_n_epoch=2")
COMPARED = ("train/loss", "val/loss", "val/loss_t=0.5", "val/base_loss", "lr", "train/grad_norm", "train/skipped_steps")


class At(L.Callback):
    """Does something when the n-th micro-batch of this process begins."""

    def __init__(self, batch: int, do) -> None:
        self.left, self.do = batch, do

    def on_train_batch_start(self, *_) -> None:
        self.left -= 1
        if self.left == 0:
            self.do()


@pytest.fixture
def at(monkeypatch):
    """at(3, do): let the next trainings do something at their third micro-batch; at(None) no more."""
    original = runs.callbacks

    def arrange(batch: int | None, do=None) -> None:
        monkeypatch.setattr(runs, "callbacks", original)
        if batch is not None:
            monkeypatch.setattr(runs, "callbacks", lambda *args: original(*args) | {"at": At(batch, do)})

    return arrange


def send(number: int):
    return lambda: os.kill(os.getpid(), number)


def outcome(folder) -> dict:
    """All that must be the same: what was logged for each step, and the adapters."""
    with (folder / "metrics.csv").open(newline="") as file:
        rows = [{name: row.get(name) or "" for name in ("step", *COMPARED)} for row in csv.DictReader(file)]
    found = {"rows": rows}
    for name in ("adapter", "adapter_best"):
        if (file := folder / name / "adapter_model.safetensors").is_file():
            found[name] = file.read_bytes()
    return found


def hidden(folder) -> list:
    return [path for path in folder.rglob(".*") if path.name != runs.LOCK]


@pytest.mark.parametrize("options", [
    ("dataset.num_workers=1", "ema.decay=0.9", "adapter.dropout=0.1", "trainer.log_every_n_steps=4"),
    *(pytest.param(options, marks=pytest.mark.slow) for options in (
        ("adapter=lokr", "save_every_n_steps=2", "trainer.log_every_n_steps=1"),
        ("dataset.num_workers=4", "optimizer=prodigy", "trainer.log_every_n_steps=1"),
        *((f"adapter={kind}", "trainer.log_every_n_steps=1") for kind in ("rslora", "dora", "loha", "oft", "none")),
        ("optimizer=adafactor", "trainer.log_every_n_steps=3", "dataset.batch_size=2"),
        ("conditioning.lm_hints=0.5", "dataset.stratify=true", "dataset.condition_dropout=0.3"),
        ("trainer.max_epochs=null", "trainer.max_steps=10", "save_every_n_steps=3"),
    )),
], ids=lambda options: "-".join(options).replace("/", "_"))  # fmt: skip
def test_stopped_three_times_it_ends_like_one_that_was_not(run, at, tmp_path, options):
    """By SIGINT inside an accumulation window, by SIGTERM in an epoch's last step, by an exception; workers change."""
    _, whole = run(*STEPS, *options)
    part = tmp_path / "part"
    workers = iter(("dataset.num_workers=1", "dataset.num_workers=0", "dataset.num_workers=4"))
    resumed = ()
    for batch, number in ((3, signal.SIGINT), (3, signal.SIGTERM)):
        at(batch, send(number))
        with pytest.raises(Interrupted, match="resume=auto") as stopped:
            run(*STEPS, *options, *resumed, folder=part)
        assert stopped.value.code == 128 + number
        resumed = ("resume=auto", next(workers))

    def fail():
        raise ZeroDivisionError("of a callback")

    at(2, fail)
    with pytest.raises(ZeroDivisionError):
        run(*STEPS, *options, *resumed, folder=part)
    at(None)
    run(*STEPS, *options, "resume=auto", next(workers), folder=part)
    assert outcome(part) == outcome(whole)
    assert not hidden(part)
