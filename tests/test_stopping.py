"""Runs that end early, by their loss on the fixed grid, and go on exactly as if they had not been stopped."""

import shutil

import pytest
from test_train import column

from acestep_lora.callbacks.checkpoints import checkpoint_folders

EPOCHS = ("trainer.max_epochs=3", "trainer.accumulate_grad_batches=2", "trainer.check_val_every_n_epoch=1")
LOGGED = ("trainer.log_every_n_steps=1", "save_every_n_epochs=1", "keep_last=null", "dataset.val_fraction=0.5")
STOP = ("early_stopping.patience=1", "early_stopping.min_delta=100")  # nothing is an improvement


@pytest.fixture(scope="module")
def whole(run):
    """Six steps, two an epoch: three validations."""
    _, folder = run(*EPOCHS, *LOGGED)
    return folder


@pytest.fixture(scope="module")
def impatient(run):
    _, folder = run(*EPOCHS, *LOGGED, *STOP)
    return folder


def same_start(part, whole, steps: int) -> None:
    for name in ("train/loss", "val/loss", "lr"):
        expected = {step: value for step, value in column(whole, name).items() if int(step) < steps}
        assert column(part, name) == expected, name


def test_patience_ends_a_run(impatient, whole):
    assert checkpoint_folders(impatient)[-1].name.endswith("step_000004")
    same_start(impatient, whole, 4)
    assert "stopped early at step 4" in (impatient / "train.log").read_text()


def test_a_resumed_run_is_as_patient(impatient, run, tmp_path):
    """It ends where the whole one ended, with the same adapter."""
    part = tmp_path / "part"
    shutil.copytree(impatient, part)
    for folder in checkpoint_folders(part)[1:]:
        shutil.rmtree(folder)
    run(*EPOCHS, *LOGGED, *STOP, "resume=auto", folder=part)
    assert column(part, "val/loss") == column(impatient, "val/loss")
    assert "at step 2, after 1 whole epochs" in (part / "train.log").read_text(encoding="utf-8")
    last = "adapter/adapter_model.safetensors"
    assert (part / last).read_bytes() == (impatient / last).read_bytes()


def test_a_run_that_ended_early_is_finished_until_more_patience_extends_it(impatient, run, tmp_path, whole):
    part = tmp_path / "part"
    shutil.copytree(impatient, part)
    again = (*EPOCHS, *LOGGED, *STOP, "resume=auto")
    result, _ = run(*again, folder=part)
    assert "is finished" in result.message and "early_stopping.patience" in result.message
    run(*again, "early_stopping.patience=9", folder=part)
    same_start(part, whole, 6)


def test_target_loss_ends_a_run(whole, run):
    first, second, _ = (float(value) for value in column(whole, "val/loss").values())
    assert second < first
    result, folder = run(*EPOCHS, *LOGGED, f"early_stopping.target_loss={(first + second) / 2}")
    assert checkpoint_folders(folder)[-1].name.endswith("step_000004") and result.metric == pytest.approx(second)


def test_time_ends_a_run_in_good_order_and_is_counted_on(run):
    limited = ("trainer.max_steps=100000", "trainer.max_time=00:00:00:04", "dataset.crop_seconds=1")
    _, folder = run(*limited)
    last = int(checkpoint_folders(folder)[-1].name[-6:])
    assert 0 < last < 1000 and str(last - 1) in column(folder, "val/loss")
    assert (folder / "adapter/adapter_model.safetensors").is_file()
    result, _ = run(*limited, "resume=auto", folder=folder)
    assert "is finished" in result.message and "trainer.max_time" in result.message
