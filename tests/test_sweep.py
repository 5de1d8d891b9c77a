"""Many runs: grids by Hydra's launchers, a search by Optuna, and what is shown of both."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import RunMode
from omegaconf import OmegaConf

from acestep_lora import cli, sweep, trials
from acestep_lora.callbacks.sweep import SweepTable
from acestep_lora.errors import UserError
from acestep_lora.trials import Trial

QUICK = ["logger=csv", "hardware=cpu", "dataset.crop_seconds=1"]


def three(tmp_path: Path) -> list[Trial]:
    """Three jobs, the last of which failed."""
    made = []
    for i, (kind, rate, metric) in enumerate([("lora", "1e-4", 2.0), ("lokr", "1e-3", 1.5), ("lora", "1e-3", None)]):
        settings = {"adapter": kind, "optimizer.lr": rate, "trainer.max_steps": "5"}
        made.append(Trial(tmp_path / str(i), settings, metric, "" if metric else "failed"))
    return made


# ---------------------------------------------------------------- what is shown


def test_jobs_are_shown_best_first_by_what_differs(tmp_path, capsys):
    jobs = three(tmp_path)
    assert trials.varied(jobs) == ["adapter", "optimizer.lr"]
    assert [job.folder.name for job in trials.ranked(jobs)] == ["1", "0", "2"]
    trials.print_table(jobs, "val/loss")
    shown = capsys.readouterr().out
    assert shown.index("adapter=lokr optimizer.lr=1e-3") < shown.index("adapter=lora optimizer.lr=1e-4")
    assert "max_steps" not in shown and "failed" in shown
    assert shown.splitlines()[-1] == f"best: {tmp_path / '1'}"


def test_page_has_every_job_and_one_picture(tmp_path):
    page = trials.write_sweep_page(tmp_path, three(tmp_path), "val/loss", "a <verdict>").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 1 and "http://" not in page and "https://" not in page
    assert "a &lt;verdict&gt;" in page and page.index("<td>1.50000</td>") < page.index("<td>failed</td>")


@pytest.mark.parametrize(
    "values, heights, ticks",
    [
        (["1e-4", "1e-3", "1e-2"], [0, 0.5, 1], {0.0: "1e-4", 0.5: "1e-3", 1.0: "1e-2"}),
        (["8", "16", "12"], [0, 1, 0.5], {0.0: "8", 1.0: "16", 0.5: "12"}),
        (["lora", "dora", "lora"], [1, 0, 1], {0.0: "dora", 1.0: "lora"}),
        (["7", "7"], [0, 0], {0.0: "7"}),
        (["0", "100"], [0, 1], {0.0: "0", 1.0: "100"}),
    ],
)
def test_axes(values, heights, ticks):
    found, marks = trials.place(values)
    assert found == pytest.approx(heights)
    assert list(marks.values()) == list(ticks.values()) and list(marks) == pytest.approx(list(ticks))


def test_nothing_varied_or_nothing_measured_makes_no_picture(tmp_path):
    jobs = three(tmp_path)
    assert trials.draw_parallel(jobs[:1], "val/loss") is None
    assert trials.draw_parallel(jobs[2:], "val/loss") is None
    assert trials.draw_parallel(jobs, "val/loss").startswith(b"\x89PNG")


# ---------------------------------------------------------------- grids


def job(folder: Path, value, **overrides: str) -> JobReturn:
    done = JobReturn(overrides=[f"{key}={text}" for key, text in overrides.items()], status=JobStatus.COMPLETED)
    done.return_value = value
    done.hydra_cfg = OmegaConf.create({"hydra": {"mode": RunMode.MULTIRUN, "runtime": {"output_dir": str(folder)}}})
    return done


def test_jobs_of_other_processes_are_in_the_table(tmp_path, capsys):
    """Each process writes its job down; the one that started the sweep reads them all."""
    for number, value in enumerate([2.5, math.nan, None, 2.0]):
        SweepTable().on_job_end(OmegaConf.create(), job(tmp_path / str(number), value, seed=str(number)))
    refused = job(tmp_path / "3", math.nan, seed="4")
    SweepTable().on_job_end(OmegaConf.create(), refused)  # a result that is there stays
    config = OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}, "metric": "val/loss"})
    SweepTable().on_multirun_end(config)
    rows = re.findall(r"^│ (\d+) +│ (\S.*?) +│ (.*?) +│$", capsys.readouterr().out, re.MULTILINE)
    assert rows[:2] == [("3", "seed=3", "2.00000"), ("0", "seed=0", "2.50000")]
    assert set(rows[2:]) == {("1", "seed=1", "failed"), ("2", "seed=2", "not measured")}
    assert (tmp_path / "sweep.html").is_file()


@pytest.mark.parametrize("name, jobs", [("lr", 6), ("adapters", 6)])
def test_grids_are_of_what_there_is(configure, name, jobs):
    from hydra import compose, initialize_config_dir

    cli.register()
    with initialize_config_dir(str(cli.CONF), version_base="1.3"):
        cfg = compose("train", [f"sweep={name}"], return_hydra_config=True)
        assert cfg.hydra.mode.name == "MULTIRUN"
        [(key, values)] = cfg.hydra.sweeper.params.items()
        made = [compose("train", [f"{key}={value}"]) for value in values.split(",")]
    assert len(made) == jobs


def start(*arguments: str) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "encoding": "utf-8"}
    return subprocess.Popen([sys.executable, *arguments], env=environment, cwd=cli.ROOT, **pipes)


@pytest.mark.slow
@pytest.mark.parametrize("launcher, jobs", [("ray", 4), ("submitit_local", 2)])
def test_launchers_run_jobs_elsewhere(run, demo_cache, tmp_path, launcher, jobs):
    """Four at a time on a local Ray without GPUs; submitit's executor for one machine."""
    pytest.importorskip(f"hydra_plugins.hydra_{launcher.split('_')[0]}_launcher")
    run("trainer.max_steps=1", "trainer.limit_val_batches=0")  # the cache
    options = [f"hydra/launcher={launcher}", *QUICK, "trainer.max_steps=2", "sample=false"]
    options += [f"dataset.cache_dir={demo_cache}", f"hydra.sweep.dir={tmp_path}"]
    options += ["hydra.launcher.ray.remote.num_gpus=0"] if launcher == "ray" else ["hydra.launcher.timeout_min=60"]
    ranks = ",".join(str(2**i) for i in range(1, jobs)) + ",0"  # the last cannot run, which stops no other
    out, err = (process := start("train.py", "-m", f"adapter.r={ranks}", *options)).communicate(timeout=1500)
    rows = re.findall(r"^│ (\d+) +│ (\S.*?) +│ (.*?) +│$", out, re.MULTILINE)
    assert process.returncode == 0 and len(rows) == jobs, out + err
    assert rows[-1][1:] == ("adapter.r=0", "failed")
    assert [float(row[2]) for row in rows[:-1]] == sorted(float(row[2]) for row in rows[:-1])
    for number in range(jobs - 1):
        assert (tmp_path / str(number) / "adapter/adapter_model.safetensors").is_file()
    assert (tmp_path / "sweep.html").is_file()


# ---------------------------------------------------------------- search

optuna = pytest.importorskip("optuna")


def space(*overrides: str) -> sweep.Space:
    return sweep.Space.read(list(overrides), OmegaConf.create({"adapter.r": "choice(8, 16)"}))


def test_command_line_is_shared_with_train():
    own, job = sweep.split(["study=a", "trials=3", "sampler.n_startup_trials=2", "trainer.max_steps=2", "-h", "name=b"])
    assert own == ["study=a", "trials=3", "sampler.n_startup_trials=2", "-h"]
    assert job == ["trainer.max_steps=2", "name=b"]


def test_ranges_are_searched_and_the_rest_is_shared():
    found = space("optimizer.lr=tag(log, interval(1e-5, 1e-3))", "adapter=lora,lokr", "dataset.dir=/a, (b)", "seed=1")
    assert list(found.searched) == ["optimizer.lr", "adapter"]
    assert found.shared == ["sample=false", "dataset.dir='/a, (b)'", "seed=1"]
    assert list(space("seed=1").searched) == ["adapter.r"]


def test_suggestions_are_inside_their_ranges():
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    found = space("optimizer.lr=tag(log, interval(1e-5, 1e-3))", "seed=int(interval(1, 9))", "adapter=lora,lokr")
    drawn = [found.suggest(study.ask()) for _ in range(60)]
    rates = [float(each["optimizer.lr"]) for each in drawn]
    assert min(rates) >= 1e-5 and max(rates) <= 1e-3 and sum(rate < 1e-4 for rate in rates) in range(18, 43)
    assert {int(each["seed"]) for each in drawn} == set(range(1, 10))
    assert {each["adapter"] for each in drawn} == {"lora", "lokr"}


def test_processes_that_are_gone_are_known():
    import socket

    import psutil

    here, me = socket.gethostname(), psutil.Process()
    assert sweep._alive([here, me.pid, me.create_time()])
    assert sweep._alive(["elsewhere", 1, 0.0])
    assert not sweep._alive([here, me.pid, me.create_time() - 100])  # the number was given out again
    assert not sweep._alive(None)


@pytest.mark.slow
def test_search_is_killed_twice_and_finds_what_it_would(run, demo_cache, tmp_path):
    """Twelve trials on nano, killed inside two of them; each of these goes on where it was."""
    run("trainer.max_steps=1", "trainer.limit_val_batches=0")  # the cache
    study, wanted = tmp_path / "study, (1)", 12
    command = ["-m", "acestep_lora.sweep", f"study={study}", f"trials={wanted}", *QUICK]
    command += [f"dataset.cache_dir={demo_cache}"]
    command += ["trainer.max_steps=12", "trainer.check_val_every_n_epoch=1", "save_every_n_steps=2"]
    command += ["optimizer.lr=tag(log, interval(1e-5, 3e-3))", "adapter.r=8,32,64"]
    for stopped_in in (2, 6):
        process, began = start(*command), time.monotonic()
        while not any((study / str(stopped_in) / "checkpoints").glob("epoch*")):
            assert process.poll() is None and time.monotonic() - began < 1500, process.communicate()
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    out, err = (process := start(*command)).communicate(timeout=1800)
    assert process.returncode == 0, out + err
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(study / "journal.log")))
    found = optuna.load_study(study_name="sweep", storage=storage).trials
    assert [trial.number for trial in found] == list(range(wanted))
    assert {trial.state.name for trial in found} <= {"COMPLETE", "PRUNED"}
    for stopped_in in (2, 6):
        assert "resuming" in (study / str(stopped_in) / "train.log").read_text(encoding="utf-8")
    assert len({json.dumps(trial.params) for trial in found}) == wanted  # nothing is drawn twice
    complete = {trial.number: trial.value for trial in found if trial.state.name == "COMPLETE"}
    best = min(complete, key=complete.get)
    assert f"best: {study / str(best)}" in out
    said = "gave val/loss" if best else "Nothing was better than the settings as they are"
    assert said in out and (study / "sweep.html").is_file()


def test_a_study_is_of_one_question(tmp_path):
    study = optuna.create_study()
    begun = SimpleNamespace(study=study, folder=tmp_path, space=space("adapter.r=8,16", "seed=2"))
    sweep.Search._check(begun)
    begun.space = space("adapter.r=8,16", "seed=1")
    sweep.Search._check(begun)  # nothing has come of it yet: it may be changed
    study.tell(study.ask(), 1.0)
    sweep.Search._check(begun)  # the same again
    begun.space = space("adapter.r=8,32", "seed=1")
    with pytest.raises(UserError, match="begun with other settings .adapter.r=8,16, adapter.r=8,32.*another study"):
        sweep.Search._check(begun)
