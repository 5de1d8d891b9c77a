"""A run that is stopped, anywhere and by anything, goes on as if it had not been; into another training it does not."""

import csv
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import lightning as L
import pytest

from acestep_lora import identity, interrupts, runs
from acestep_lora.callbacks.checkpoints import checkpoint_folders
from acestep_lora.cli import ROOT
from acestep_lora.errors import UserError
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


# ---------------------------------------------------------------- processes that are told to stop

COMMON = (
    *("logger=csv", "sample=false", "hardware=cpu", "dataset.crop_seconds=2", "name=stopped", "ema.decay=0.9"),
    *("trainer.max_epochs=8", "trainer.accumulate_grad_batches=2", "trainer.check_val_every_n_epoch=1"),
    *("trainer.log_every_n_steps=1", "save_every_n_steps=3", "keep_last=3"),
)


@pytest.fixture
def start(demo_cache, tmp_path):
    """start("resume=auto", SLURM_JOB_ID="1") -> a training as a process of its own, in a session of its own."""
    running = []

    def begin(*options: str, folder=tmp_path / "out", **variables: str) -> subprocess.Popen:
        command = [sys.executable, str(ROOT / "train.py"), *COMMON, *options]
        command += [f"dataset.cache_dir={demo_cache}", f"output_dir={folder}"]
        running.append(
            subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"} | variables,
            )
        )
        return running[-1]

    yield begin
    for process in running:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def until(what, process: subprocess.Popen, seconds: float = 900) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_ctrl_c_saves_and_says_how_to_go_on(start, tmp_path):
    """As a terminal sends it: to all processes of the group, the loader's too."""
    folder = tmp_path / "out"
    process = start("trainer.max_epochs=9999", "dataset.num_workers=2")
    until(lambda: checkpoint_folders(folder), process)
    os.killpg(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 130 and "Traceback" not in said, said
    assert f"output_dir={folder} resume=auto" in said
    last = checkpoint_folders(folder)[-1]
    assert str(last) in said and not hidden(folder)


def test_a_second_ctrl_c_leaves_at_once_and_an_echo_of_the_first_does_not():
    """In a run that never comes to a place where it could stop."""
    program = "import time; from acestep_lora.interrupts import Interrupt\n"
    program += "with Interrupt().listening():\n  print('ready', flush=True)\n  time.sleep(600)\n  time.sleep(600)"
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == "\n" and "Ctrl+C again leaves at once" in process.stderr.readline()
    process.send_signal(signal.SIGINT)  # as a launcher passes it on
    process.send_signal(signal.SIGTERM)
    time.sleep(interrupts.ECHO * 2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT


def test_an_error_that_a_signal_made_is_told_as_the_signal():
    with pytest.raises(Interrupted, match="nothing is lost") as caught, interrupts.raising("nothing is lost"):
        try:
            signal.raise_signal(signal.SIGTERM)
        except Interrupted:  # as numpy does while it is imported
            raise ImportError("cannot load module more than once per process") from None
    assert caught.value.code == 143
    with pytest.raises(ImportError, match="no such module"), interrupts.raising("nothing is lost"):
        raise ImportError("no such module")


@pytest.mark.parametrize("job, asked", [
    ({"SLURM_JOB_ID": "77"}, "requeue 77"),
    ({"SLURM_JOB_ID": "77", "SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "4"}, "requeue 70_4"),
])  # fmt: skip
def test_slurm_is_asked_to_run_the_job_again(monkeypatch, tmp_path, job, asked):
    """A script in scontrol's place writes down what it is asked."""
    script = tmp_path / "scontrol"
    script.write_text(f"#!/bin/sh\necho $* > {tmp_path}/asked\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    assert not interrupts.requeue()
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    assert interrupts.requeue()
    assert (tmp_path / "asked").read_text().strip() == asked
    script.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not interrupts.requeue()


def test_a_job_that_slurm_runs_again_goes_on(run, at, tmp_path, monkeypatch):
    at(3, send(signal.SIGUSR1))
    folder = tmp_path / "out"
    with pytest.raises(Interrupted):
        run("trainer.max_steps=4", folder=folder)
    at(None)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    run("trainer.max_steps=4", folder=folder)
    assert (folder / "adapter").is_dir()


@pytest.mark.slow
def test_forty_kills_at_random_moments_change_nothing(start, tmp_path):
    """kill -9 of the whole group, over and over, until the run has survived forty; then as if there had been none."""
    whole, chance = tmp_path / "whole", random.Random(6)
    started = time.monotonic()
    process = start(folder=whole)
    process.communicate()
    assert process.returncode == 0
    seconds, kills, folder = time.monotonic() - started, 0, tmp_path / "part"
    while kills < 40:
        while not (folder / "adapter").is_dir() and kills < 40:
            process = start("resume=auto", f"dataset.num_workers={chance.choice((0, 1, 4))}", folder=folder)
            time.sleep(chance.uniform(0.2, 1.1) * seconds)
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                kills += 1
                print("kill", kills, "at", [path.name for path in checkpoint_folders(folder)][-1:], flush=True)
            process.communicate()
        process = start("resume=auto", folder=folder)
        process.communicate()
        assert process.returncode == 0
        assert outcome(folder) == outcome(whole)
        assert not hidden(folder)
        shutil.rmtree(folder)


# ---------------------------------------------------------------- another training


@pytest.fixture(scope="module")
def begun(run):
    """A run of four steps, its checkpoint inside an epoch."""
    return run("trainer.max_steps=2", "adapter.r=8")[1]


@pytest.mark.parametrize("option, told", [
    ("adapter.r=4", "adapter.r was 8 and is 4"), ("adapter=lokr", "adapter.config._target_ was peft.LoraConfig and is"),
    ("adapter.attention=self", "adapter.attention was both and is self"), ("adapter.layers=0-1", "adapter.layers was"),
    ("optimizer=adafactor", "optimizer._target_ was torch.optim.AdamW and is"),
    ("optimizer.lr=1e-5", "optimizer.lr was 0.001 and is 1e-05"),
    ("scheduler=linear", "scheduler.name was cosine and is linear"),
])  # fmt: skip
def test_what_its_tensors_were_made_for_cannot_change(run, begun, tmp_path, option, told):
    copy = tmp_path / "copy"
    shutil.copytree(begun, copy)
    for flag in ("false", "true"):
        with pytest.raises(UserError) as error:
            run("trainer.max_steps=4", "adapter.r=8", option, "resume=auto", f"allow_changes={flag}", folder=copy)
        assert told in str(error.value) and "adapter.init_from=" in str(error.value)
    assert len(checkpoint_folders(copy)) == 1


@pytest.mark.parametrize("option, told", [
    ("dataset.custom_tag=other", "has changed"), ("adapter.dropout=0.5", "lora_dropout was 0.0 and is 0.5"),
    *(pytest.param(*each, marks=pytest.mark.slow) for each in (
        ("dataset.crop_seconds=1", "dataset.crop_seconds was 2 and is 1"), ("seed=7", "seed was 42 and is 7"),
        ("timesteps=uniform", "timesteps._target_ was"),
    )),
])  # fmt: skip
def test_the_rest_may_change_when_asked_to(run, begun, tmp_path, option, told):
    copy = tmp_path / "copy"
    shutil.copytree(begun, copy)
    with pytest.raises(UserError, match="allow_changes=true") as error:
        run("trainer.max_steps=4", "adapter.r=8", option, "resume=auto", folder=copy)
    assert told in str(error.value)
    run("trainer.max_steps=4", "adapter.r=8", option, "resume=auto", "allow_changes=true", folder=copy)


def test_another_base_model_and_other_songs_are_named(begun):
    before = runs.open_run(begun, "", "auto", False, True)
    song = next(name for name in before.identity if name.startswith("song "))
    now = {name: value for name, value in before.identity.items() if name != song}
    with pytest.raises(UserError, match=f"{song} is gone; song new.wav is new"):
        identity.check(before.checkpoint, before.identity, now | {"song new.wav": "0"}, allow_changes=False)
    with pytest.raises(UserError, match="the base model's weights differ"):
        identity.check(before.checkpoint, before.identity, before.identity | {"base model": "0"}, allow_changes=True)


def test_loader_processes_and_where_things_are_may_change(run, begun, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(begun, copy)
    run("trainer.max_steps=3", "adapter.r=8", "dataset.num_workers=1", "dataset.preload=false", "keep_last=5",
        "resume=auto", folder=copy)  # fmt: skip


# ---------------------------------------------------------------- the end


@pytest.mark.parametrize("length, validated", [
    (("trainer.max_steps=6", "trainer.check_val_every_n_epoch=1"), ["3", "5"]),  # ends inside its second epoch
    (("trainer.max_epochs=3", "trainer.check_val_every_n_epoch=2"), ["7", "11"]),
])  # fmt: skip
def test_the_last_state_is_always_validated(run, length, validated):
    result, folder = run(*length, "trainer.accumulate_grad_batches=2", "trainer.log_every_n_steps=1")
    assert [row["step"] for row in outcome(folder)["rows"] if row["val/loss"]] == validated
    assert result.metric == float([row["val/loss"] for row in outcome(folder)["rows"] if row["val/loss"]][-1])


def test_a_run_killed_before_its_last_export_is_not_finished(run, at, tmp_path, monkeypatch):
    """Its last checkpoint gets its name after everything else, so that going on makes all of it again."""
    from acestep_lora.callbacks.checkpoints import Checkpoints

    options = ("trainer.max_steps=6", "trainer.accumulate_grad_batches=2", "trainer.log_every_n_steps=1")
    options += ("save_every_n_steps=2", "trainer.check_val_every_n_epoch=1")
    _, whole = run(*options)
    part = tmp_path / "part"
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "export", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(*options, folder=part)
    run(*options, "resume=auto", folder=part)
    assert outcome(part) == outcome(whole)
    assert "is finished" in run(*options, "resume=auto", folder=part)[0].message


def test_two_trainings_do_not_share_a_folder(run, at, tmp_path):
    """The second is refused while the first one trains, even to start over; afterwards nothing is locked."""
    folder, refused = tmp_path / "out", []

    def second() -> None:
        command = [sys.executable, str(ROOT / "train.py"), *COMMON, "overwrite=true", f"output_dir={folder}"]
        process = subprocess.run(command, capture_output=True, text=True, check=False)
        refused.append((process.returncode, process.stderr.splitlines()[-1]))

    at(2, second)
    run("trainer.max_steps=2", folder=folder)
    assert refused == [(1, f"error: {folder} is in use by another training.")]
    at(None)
    run("trainer.max_steps=3", "resume=auto", folder=folder)
