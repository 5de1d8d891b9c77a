"""One run in several processes: the same numbers, the same files, as many ways to start them as there are."""

import csv
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import soundfile
import torch
from builders import write_songs
from lightning.pytorch.plugins.environments import SLURMEnvironment
from safetensors.torch import load_file

from acestep_lora import cli
from acestep_lora.callbacks.checkpoints import checkpoint_folders
from acestep_lora.data.datamodule import DatasetError
from acestep_lora.data.draws import EpochOrder
from acestep_lora.errors import UserError
from acestep_lora.hardware import Hardware
from acestep_lora.processes import is_first
from acestep_lora.sharding import FSDP2

STEPS = ["trainer.max_steps=6", "trainer.check_val_every_n_epoch=1", "trainer.log_every_n_steps=1"]
STEPS += ["dataset.val_fraction=0.4", "module.grad_norms_every_n_steps=1", "save_every_n_epochs=1", "keep_last=null"]
MEASURED = ("train/loss", "val/loss", "val/base_loss", "val/loss_t=0.1", "val/loss_t=0.9", "train/grad_norm")


@pytest.fixture(scope="module")
def begin(run, demo_cache):
    """begin(folder, "hardware.devices=2", NODE_RANK="0") -> a train.py process that has begun, its cache being full."""
    run("trainer.max_steps=1", "trainer.limit_val_batches=0")

    def go(folder: Path, *overrides: str, **environment: str) -> subprocess.Popen:
        command = [sys.executable, str(cli.ROOT / "train.py"), "logger=csv", "sample=false", "hardware=cpu", *STEPS]
        command += ["dataset.crop_seconds=2", f"dataset.cache_dir={demo_cache}", f"output_dir={folder}", *overrides]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "encoding": "utf-8"}
        return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment, **pipes)

    return go


def finish(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=1200)
    assert process.returncode == 0, out + err
    return out


def metrics(folder: Path, name: str) -> list[float]:
    with (folder / "metrics.csv").open(newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


def assert_same_run(one: Path, other: Path) -> None:
    for name in MEASURED:
        assert metrics(one, name) == pytest.approx(metrics(other, name), abs=1e-5), name
    first, second = (load_file(folder / "adapter/adapter_model.safetensors") for folder in (one, other))
    assert first.keys() == second.keys()
    assert max(float((first[name] - second[name]).abs().max()) for name in first) < 1e-5


@pytest.fixture(scope="module")
def alone(run):
    """The run that the others are compared with: four songs a step, one process."""
    return run(*STEPS, "trainer.accumulate_grad_batches=4")[1]


# ---------------------------------------------------------------- training


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 4])
def test_ddp_trains_as_one_process(begin, alone, tmp_path, devices):
    folder = tmp_path / "out, it's (1)"  # the processes are started again from the command line
    split = [f"hardware.devices={devices}", "hardware.strategy=ddp", f"trainer.accumulate_grad_batches={4 // devices}"]
    said = finish(begin(folder, *split))
    assert_same_run(folder, alone)
    assert said.count("adapter: ") == said.count("8 songs") == 1  # one process speaks
    assert len(checkpoint_folders(folder)) == len(checkpoint_folders(alone))


@pytest.mark.slow
def test_nodes_are_started_separately(begin, alone, tmp_path):
    """Two nodes of two devices, each with an output folder of its own name, as `${now:}` gives them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    split = ["hardware.num_nodes=2", "hardware.devices=2", "trainer.accumulate_grad_batches=1"]
    nodes = [begin(tmp_path / rank, *split, NODE_RANK=rank, MASTER_ADDR="127.0.0.1", MASTER_PORT=port) for rank in "01"]
    said = [finish(node) for node in nodes]
    assert_same_run(tmp_path / "0", alone)
    assert not (tmp_path / "1").exists()
    assert "adapter: " in said[0] and "adapter: " not in said[1]


@pytest.fixture(scope="module")
def shared(begin, tmp_path_factory):
    """A run of two processes that share the weights."""
    folder = tmp_path_factory.mktemp("fsdp2") / "out"
    finish(begin(folder, *SHARED))
    return folder


SHARED = ["hardware.devices=2", "hardware.strategy=fsdp2", "trainer.accumulate_grad_batches=2"]


@pytest.mark.slow
def test_fsdp2_trains_as_one_process(shared, alone):
    assert_same_run(shared, alone)
    ours, theirs = (torch.load(checkpoint_folders(f)[-1] / "state.ckpt", weights_only=True) for f in (shared, alone))
    assert ours["state_dict"].keys() == theirs["state_dict"].keys()
    assert {type(value) for value in ours["state_dict"].values()} == {torch.Tensor}
    first, second = (state["optimizer_states"][0]["state"][0]["exp_avg"] for state in (ours, theirs))
    torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-4)


def without_the_end(whole: Path, folder: Path) -> Path:
    """A copy of a run that was killed in its last epoch."""
    shutil.copytree(whole, folder)
    shutil.rmtree(checkpoint_folders(folder)[-1])
    for name in ("adapter", "adapter_best"):
        shutil.rmtree(folder / name)
    return folder


@pytest.mark.slow
def test_fsdp2_resumes_exactly(begin, shared, tmp_path):
    part = without_the_end(shared, tmp_path / "part")
    finish(begin(part, *SHARED, "resume=auto"))
    for name in MEASURED:
        assert metrics(part, name) == metrics(shared, name), name
    adapters = [(folder / "adapter/adapter_model.safetensors").read_bytes() for folder in (part, shared)]
    assert adapters[0] == adapters[1]


@pytest.mark.slow
def test_one_process_resumes_what_two_began_and_the_other_way_round(run, begin, shared, alone, tmp_path):
    one = without_the_end(shared, tmp_path / "one")
    run(*STEPS, "trainer.accumulate_grad_batches=4", "resume=auto", folder=one)
    assert_same_run(one, alone)
    two = without_the_end(alone, tmp_path / "two")
    finish(begin(two, *SHARED, "resume=auto"))
    assert_same_run(two, alone)


@pytest.mark.slow
def test_fsdp2_takes_dora_and_an_average(run, begin, tmp_path):
    """DoRA's export asks for base weights, the average is kept in parts."""
    options = ["adapter=dora", "ema.decay=0.5", "trainer.max_steps=4"]
    finish(begin(tmp_path / "two", *SHARED, *options))
    _, one = run(*STEPS, "trainer.accumulate_grad_batches=4", *options)
    assert_same_run(tmp_path / "two", one)
    names = [{path.name for path in (folder / "adapter").iterdir()} for folder in (tmp_path / "two", one)]
    assert names[0] == names[1]


def test_what_cannot_be_shared_is_refused(run):
    with pytest.raises(UserError, match="hardware.strategy=fsdp2 does not train in float16"):
        Hardware(strategy="fsdp2", precision="16-mixed")
    with pytest.raises(UserError, match="model.quantize=nf4 cannot be dealt out"):
        run("hardware.strategy=fsdp2", "hardware.devices=2", "model.quantize=nf4")
    with pytest.raises(UserError, match="optimizer=adamw or prodigy"):
        run("hardware.strategy=fsdp2", "hardware.devices=2", "optimizer=adafactor")


# ---------------------------------------------------------------- which process this is


@pytest.mark.parametrize(
    "environment, first",
    [
        ({}, True),
        ({"LOCAL_RANK": "0", "NODE_RANK": "0"}, True),
        ({"LOCAL_RANK": "1"}, False),
        ({"NODE_RANK": "1"}, False),
        ({"RANK": "8", "LOCAL_RANK": "0", "GROUP_RANK": "1"}, False),
        ({"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, True),
        ({"SLURM_PROCID": "3", "SLURM_LOCALID": "1"}, False),
    ],
)
def test_one_process_of_all_is_the_first(monkeypatch, environment, first):
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert is_first() is first


@pytest.mark.parametrize(
    "options, processes",
    [
        ({}, 1),
        ({"devices": 2}, 2),
        ({"devices": "4", "num_nodes": 2}, 8),
        ({"devices": "0,3"}, 2),
        ({"devices": "auto", "accelerator": "cpu"}, 1),
    ],
)
def test_processes_are_counted(options, processes):
    assert Hardware(**options).processes == processes


def test_an_epoch_is_not_continued_in_other_parts(begin_order):
    state = {"taken": 2, "of": 5, "cut": [1, 4, 1]}
    with pytest.raises(DatasetError, match=r"an epoch of 1 x 4 x 1 songs a step .* and not 1 x 2 x 2: resume"):
        begin_order(accumulate=2, world=2).load_state_dict(state)
    begin_order(accumulate=2, world=2).load_state_dict(state | {"taken": 5})  # it was over
    same = begin_order(accumulate=4, world=1)
    same.load_state_dict(state)
    assert same.batch_sampler.start == 2


@pytest.fixture
def begin_order():
    """begin_order(accumulate=2, world=2) -> a loader of nothing in particular."""
    from acestep_lora.data.datamodule import ResumableLoader

    dataset = SimpleNamespace(songs=[SimpleNamespace(track=SimpleNamespace(repeat=1))] * 5)
    return lambda accumulate, world: ResumableLoader(
        dataset, batch_sampler=EpochOrder(dataset, 1, accumulate, world=world)
    )


# ---------------------------------------------------------------- Slurm


def test_requeueing_is_left_to_the_job_script(monkeypatch):
    assert Hardware().trainer_options()["plugins"] is None
    for name, value in {"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "train", "SLURM_JOB_ID": "7"}.items():
        monkeypatch.setenv(name, value)
    [plugin] = Hardware().trainer_options()["plugins"]
    assert isinstance(plugin, SLURMEnvironment) and not plugin.auto_requeue


def test_only_training_is_sharded():
    hardware = Hardware(accelerator="cpu", devices=2, strategy="fsdp2")
    assert hardware.trainer_options()["strategy"] == "auto"
    assert isinstance(hardware.trainer_options(shard=True)["strategy"], FSDP2)


# ---------------------------------------------------------------- preprocessing


@pytest.mark.slow
def test_preprocessing_in_two_processes_is_that_in_one(tmp_path):
    songs = write_songs(tmp_path / "songs", 16000, count=5)
    samples, rate = soundfile.read(songs[0])
    soundfile.write(tmp_path / "songs/copy.wav", samples, rate)  # two processes may encode the same song
    (tmp_path / "songs/bad.wav").write_text("not audio", encoding="utf-8")
    found = {}
    for devices in (1, 2):
        cache = tmp_path / f"cache {devices}"
        command = [
            sys.executable,
            str(cli.ROOT / "preprocess.py"),
            "dataset=folder",
            f"dataset.dir={tmp_path / 'songs'}",
        ]
        command += [f"dataset.cache_dir={cache}", "hardware=cpu", f"hardware.devices={devices}"]
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=1200)
        assert done.returncode == cli.LEFT_OUT, done.stderr
        assert done.stdout.count(f"6 songs in {cache}, 6 of them made now") == 1
        assert "'bad.wav' is not audio" in done.stdout
        found[devices] = {path.name: load_file(path) for path in cache.glob("*.safetensors")}
    one, two = found[1], found[2]
    assert one.keys() == two.keys() and len(one) == 6
    for entry in one:
        assert one[entry].keys() == two[entry].keys()
        assert all(torch.equal(tensor, two[entry][name]) for name, tensor in one[entry].items())


def test_a_song_whose_words_do_not_fit_is_not_missing(configure, nano, tmp_path):
    """Several devices train on what is there: what preprocessing could not make is not asked for again."""
    from hydra.utils import instantiate

    write_songs(tmp_path, 16000, count=2)
    (tmp_path / "song_1.json").write_text('{"custom_tag": "' + "tag " * 400 + '"}', encoding="utf-8")

    def make():
        cfg = configure("train", "dataset=folder", f"dataset.dir={tmp_path}")
        return instantiate(cfg.dataset, _partial_=True)(base=nano, conditioning=instantiate(cfg.conditioning))

    data = make()
    data.encode(accelerator="cpu", devices=1)
    [(_, reason)] = data.bad
    again = make()
    again.trainer = SimpleNamespace(global_rank=0, world_size=2)
    again.prepare_data()
    assert [song.track.id for song in again.songs] == ["song_0.wav"]
    assert again.bad == [(tmp_path / "song_1.wav", reason)]


# ---------------------------------------------------------------- sweeps


def test_jobs_of_several_processes_are_refused_where_nobody_starts_them(tmp_path):
    command = [sys.executable, str(cli.ROOT / "train.py"), "-m", "hardware=cpu", "hardware.devices=2", "adapter.r=2,4"]
    done = subprocess.run(
        [*command, f"hydra.sweep.dir={tmp_path}"], capture_output=True, text=True, encoding="utf-8", timeout=100
    )
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert line.startswith("error: hardware.devices=2 cannot be swept here") and "submitit_slurm" in line
