"""Full disks, vanished folders, damaged checkpoints, numbers that are none: told in one sentence, nothing good lost."""

import csv
import logging
import resource
import shutil
import subprocess
import sys

import lightning as L
import pytest
import torch
from builders import write_songs
from safetensors.torch import load_file

from acestep_lora import cli, runs
from acestep_lora.adapter_files import read
from acestep_lora.callbacks.checkpoints import checkpoint_folders
from acestep_lora.errors import UserError
from acestep_lora.hashes import damage, seal, sealed
from acestep_lora.module import FlowModule
from acestep_lora.numerics import Guard, NumericError

STEPS = ("trainer.max_steps=8", "trainer.accumulate_grad_batches=1", "trainer.log_every_n_steps=1")


def column(folder, name) -> list[float]:
    with (folder / "metrics.csv").open(newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


def weights(folder, which="adapter"):
    return load_file(folder / which / "adapter_model.safetensors")


# ---------------------------------------------------------------- disks


@pytest.mark.parametrize("limit", [3_000, 200_000, 3_000_000])
def test_a_full_disk_is_told_and_leaves_the_last_checkpoint_whole(run, tmp_path, limit):
    """Files beyond so many bytes cannot be written: metrics.csv or logs, an adapter, a checkpoint."""
    folder = tmp_path / "out"
    run("trainer.max_steps=2", "save_every_n_steps=1", folder=folder)
    kept = checkpoint_folders(folder)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(UserError, match="written|Cannot write") as told:
            run("trainer.max_steps=60", "save_every_n_steps=1", "trainer.log_every_n_steps=1", "resume=auto",
                folder=folder)  # fmt: skip
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(folder) in str(told.value)
    assert set(kept) & set(checkpoint_folders(folder))
    assert all(damage(path / "state.ckpt") is None for path in checkpoint_folders(folder))
    run("trainer.max_steps=4", "resume=auto", folder=folder)


def test_a_folder_that_is_deleted_during_a_run_is_told(run, tmp_path, monkeypatch):
    folder = tmp_path / "out"

    class Delete(L.Callback):
        def on_train_batch_start(self, trainer, *_) -> None:
            if trainer.global_step == 3:
                shutil.rmtree(folder)

    original = runs.callbacks
    monkeypatch.setattr(runs, "callbacks", lambda *args: original(*args) | {"delete": Delete()})
    with pytest.raises(UserError, match="Cannot write to .*metrics.csv"):
        run(*STEPS, folder=folder)


def test_an_output_folder_that_cannot_be_made_is_told_at_once(run, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match="Cannot write to .*output_dir"):
        run(*STEPS, folder=tmp_path / "file" / "out")


@pytest.mark.system
@pytest.mark.parametrize("options", ["size=6m", "size=1m", "ro"])
def test_small_and_read_only_file_systems(run, tmp_path, options):
    folder = tmp_path / "mounted"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)
    try:
        with pytest.raises(UserError, match="written|Cannot write"):
            run("trainer.max_steps=30", "save_every_n_steps=1", "keep_last=null", folder=folder / "out")
        for path in checkpoint_folders(folder / "out"):
            assert damage(path / "state.ckpt") is None
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_cache_without_room_is_told_by_its_folder(tmp_path):
    """The spool of a song, not its entry, is what does not fit; no song is blamed."""
    write_songs(tmp_path / "songs", 24_000, count=2)
    limited = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)); "
    limited += "sys.path.insert(0, ''); sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    command = ["preprocess.py", f"dataset.dir={tmp_path / 'songs'}", "hardware=cpu", "hardware.num_workers=1"]
    done = subprocess.run([sys.executable, "-c", limited, *command], cwd=cli.ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"error: Cannot write to {tmp_path / 'songs/.acestep'} ([Errno 27] File too large)" in done.stderr
    assert not [path for path in (tmp_path / "songs/.acestep").iterdir() if path.suffix in (".f32", ".tmp")]
    assert not (tmp_path / "songs/.acestep/bad.json").exists()


def test_a_sealed_folder_knows_its_files(tmp_path):
    for name, data in {"a": b"one", "sub/b": b"two"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    assert damage(tmp_path / "a") == "sha256.json does not say what it should be"
    assert sealed(tmp_path / "sub/b") is None
    seal(tmp_path)
    assert damage(tmp_path / "a") is None and damage(tmp_path / "sub/b") is None
    assert sealed(tmp_path / "a") == sealed(tmp_path / "sub/b") == tmp_path
    (tmp_path / "sub/b").write_bytes(b"TWO")
    assert damage(tmp_path / "sub/b") == "its content has changed"
    (tmp_path / "a").write_bytes(b"two")
    assert damage(tmp_path / "a") == "its content has changed"
    (tmp_path / "a").write_bytes(b"on")
    assert damage(tmp_path / "a") == "2 bytes instead of 3"
    (tmp_path / "a").unlink()
    assert damage(tmp_path / "a") == "No such file or directory"


@pytest.fixture(scope="module")
def finished(run):
    return run(*STEPS, "save_every_n_steps=2", "keep_last=null")[1]


def test_one_changed_bit_of_a_checkpoint_is_found_and_the_one_before_is_used(finished, tmp_path, caplog):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    *_, before, last = checkpoint_folders(copy)
    data = bytearray((last / "state.ckpt").read_bytes())
    data[len(data) // 2] ^= 1
    (last / "state.ckpt").write_bytes(data)
    found = runs.open_run(copy, "demo", resume="auto", overwrite=False, given=True)
    assert found.checkpoint == before / "state.ckpt"
    assert f"{last} is damaged (its content has changed); going on from {before} instead" in caplog.text
    with pytest.raises(UserError, match="its content has changed"):
        runs.open_run(copy, "demo", resume=str(last), overwrite=False, given=True)


def test_a_checkpoint_that_nothing_vouches_for_is_not_used(finished, tmp_path, caplog):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    *_, before, last = checkpoint_folders(copy)
    (last / "sha256.json").unlink()
    found = runs.open_run(copy, "demo", resume="auto", overwrite=False, given=True)
    assert found.checkpoint == before / "state.ckpt" and "sha256.json does not say" in caplog.text


def test_one_changed_bit_of_a_checkpoints_adapter_is_found(finished, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    folder = checkpoint_folders(copy)[-1] / "adapter"
    read(folder)
    data = bytearray((folder / "adapter_model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "adapter_model.safetensors").write_bytes(data)
    with pytest.raises(UserError, match="its content has changed"):
        read(folder)


def test_damaged_checkpoints_alone_are_no_reason_to_start_from_zero(finished, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    for folder in checkpoint_folders(copy):
        (folder / "state.ckpt").write_bytes(b"")
    with pytest.raises(UserError, match="so is every other checkpoint.*overwrite=true"):
        runs.open_run(copy, "demo", resume="auto", overwrite=False, given=True)
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(UserError, match="adapter/ but no checkpoint"):
        runs.open_run(copy, "demo", resume="auto", overwrite=False, given=True)


# ---------------------------------------------------------------- numbers


@pytest.fixture
def spoilt(monkeypatch):
    """spoilt({3, 4}, value): the losses of these optimizer steps are multiplied by value; or another place is hit."""

    def arrange(steps: set[int], value: float, place: str = "loss") -> None:
        original = FlowModule.losses

        def losses(self, batch):
            if self.global_step in steps and self.trainer.training:
                if place == "latents":
                    batch.latents[..., 0] = value
                elif place == "weight":
                    next(iter(self.trainable().values())).data[0] = value
                elif place == "gradient":
                    for parameter in self.trainable().values():
                        parameter.register_hook(
                            lambda gradient, at=self.global_step: (
                                gradient * value if self.global_step == at else gradient
                            )
                        )
                else:
                    return original(self, batch) * value
            return original(self, batch)

        monkeypatch.setattr(FlowModule, "losses", losses)

    return arrange


@pytest.mark.parametrize("optimizer, place, value", [
    ("adamw", "loss", float("nan")), ("adamw", "latents", float("inf")), ("adamw", "gradient", float("nan")),
    ("prodigy", "loss", float("nan")), ("adafactor", "gradient", float("inf")),
])  # fmt: skip
def test_a_step_that_is_not_finite_is_skipped_counted_and_its_song_named(run, spoilt, caplog, optimizer, place, value):
    spoilt({2}, value, place)
    with caplog.at_level(logging.WARNING):
        _, folder = run(
            *STEPS, f"optimizer={optimizer}", "scheduler=constant", "save_every_n_steps=1", "keep_last=null"
        )
    assert column(folder, "train/skipped_steps") == [0, 0, 1, 1, 1, 1, 1, 1]
    assert "1 of 1 steps up to step 3 were skipped" in caplog.text and ".mp3" in caplog.text or ".ogg" in caplog.text
    second, third, fourth = (weights(path) for path in checkpoint_folders(folder)[1:4])
    assert all(torch.equal(second[name], third[name]) for name in second), "skipped: weights as they were"
    assert not all(torch.equal(third[name], fourth[name]) for name in third), "and then it goes on"
    assert all(tensor.isfinite().all() for tensor in weights(folder).values())


def test_a_skipped_step_leaves_no_trace_in_the_optimizer(run, spoilt):
    """Moments, step counts and weights are those of before, bit for bit, for the fused optimizer as for others."""
    spoilt({2}, float("nan"))
    for fused in ("true", "false"):
        _, folder = run(*STEPS, f"optimizer.fused={fused}", "save_every_n_steps=1", "keep_last=null")
        second, third = (
            torch.load(path / "state.ckpt", weights_only=True)["optimizer_states"][0]["state"]
            for path in checkpoint_folders(folder)[1:3]
        )
        for key, values in second.items():
            assert all(torch.equal(value, third[key][name]) for name, value in values.items())


def test_too_many_in_a_row_end_the_run_with_the_last_good_state_saved(run, spoilt, tmp_path):
    folder = tmp_path / "out"
    spoilt(set(range(4, 99)), float("nan"))
    with pytest.raises(NumericError, match=r"after 3 in a row: lower optimizer.lr") as told:
        run("trainer.max_steps=20", *STEPS[1:], "module.max_skipped=3", folder=folder)
    assert told.value.args[0].count(".") > 1
    last = checkpoint_folders(folder)[-1]
    assert damage(last / "state.ckpt") is None
    assert all(tensor.isfinite().all() for tensor in weights(last).values())


def test_weights_that_are_not_finite_are_never_saved(run, spoilt, tmp_path):
    spoilt({5}, float("nan"), "weight")
    folder = tmp_path / "out"
    with pytest.raises(NumericError, match="no longer finite.*resume=auto"):
        run(*STEPS, "save_every_n_steps=2", "keep_last=null", folder=folder)
    for path in checkpoint_folders(folder):
        assert all(tensor.isfinite().all() for tensor in weights(path).values())
    assert not (folder / "adapter").exists()
    runs.open_run(folder, "demo", resume="auto", overwrite=False, given=True)


def test_a_spike_is_skipped_once_the_usual_loss_is_known():
    guard, usual = Guard(spike=5.0, max_skipped=3), torch.tensor(1.0)
    for step in range(40):
        assert not guard.judge(usual, torch.tensor(1.0 + step % 2), scaled=False)
    guard.report(40)
    guard.see(torch.tensor([0.5, 30.0]), ["quiet.wav", "loud.wav"])
    assert guard.judge(usual, torch.tensor(15.25), scaled=False)
    average = guard.state[0].clone()
    with pytest.MonkeyPatch.context() as patch:
        said = []
        patch.setattr("acestep_lora.numerics.log.warning", said.append)
        guard.report(41)
    assert "loud.wav" in said[0] and "quiet.wav" not in said[0]
    assert guard.state[0] == average == guard.state[0] and guard.skipped == 1
    assert not guard.judge(usual, torch.tensor(1.0), scaled=False)
    assert guard.judge(usual, torch.tensor(float("nan")), scaled=True)
    assert not guard.judge(torch.tensor(float("inf")), torch.tensor(1.0), scaled=True), "a loss scaler's own affair"
    assert not Guard(spike=None).judge(usual, torch.tensor(1e30), scaled=False)


@pytest.mark.parametrize("options, message", [
    ({"spike": 1.0}, "above 1"), ({"max_skipped": 0}, "at least 1"),
])  # fmt: skip
def test_limits_that_cannot_be_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        Guard(**options)


# ---------------------------------------------------------------- nothing to do


@pytest.mark.parametrize("option, message", [
    ("trainer.max_steps=0", "train nothing"), ("trainer.max_epochs=0", "train nothing"),
    ("trainer.limit_train_batches=0", "nothing of an"), ("trainer.limit_train_batches=0.01", "nothing of an"),
    ("trainer.accumulate_grad_batches=0", "at least 1"),
    ("dataset.batch_size=0", "at least 1, got 0"), ("optimizer.lr=-1", "optimizer: .*-1"), ("ema.decay=2", "got 2"),
    ("dataset.val_fraction=1.5", "val_fraction"), ("trainer.max_steps=-3", "got -3"), ("name=null", "name must be"),
])  # fmt: skip
def test_a_run_that_would_do_nothing_ends_before_weights_are_read(run, monkeypatch, option, message):
    monkeypatch.setattr("acestep_lora.module.load_dit", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(UserError, match=message):
        run("trainer.max_steps=2", option)
