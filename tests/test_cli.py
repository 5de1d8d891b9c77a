"""The commands as a user runs them, in their own processes: a folder of songs with a hostile name, to audio."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import soundfile
from omegaconf import OmegaConf

from acestep_lora import cli, limits
from acestep_lora.errors import UserError

HERE = Path(__file__).parent
BAD = """zero_byte.flac zero_byte.mp3 zero_byte.wav head_only.flac head_only.mp3 head_only.opus header_only.wav
one_sample.wav short_0_1s.wav text_renamed.wav truncated.ogg""".split()
GOOD = "ok.mp3 ok.ogg ok.opus ok_mono_low.mp3 vbr_noxing.mp3 silence.flac truncated.flac".split()
DEMO = ("morning_tide.mp3", "morning_tide.lyrics.txt", "morning_tide.caption.txt", "morning_tide.json")


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """start("train.py", "seed=1", ...) -> the finished process, run from a folder that is not the project's."""
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "歌詞, (1).txt").write_text("[Verse 1]\nSongs, it's a\n", encoding="utf-8")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", "PYTHONIOENCODING": "utf-8"}
    environment.pop("HYDRA_FULL_ERROR", None)

    def run(script: str, *arguments: str, **options) -> subprocess.CompletedProcess:
        command = [sys.executable, str(cli.ROOT / script), *arguments]
        options = {"cwd": folder, "env": environment, "capture_output": True, "timeout": 600} | options
        return subprocess.run(command, text=True, encoding="utf-8", **options)

    return run


@pytest.fixture(scope="module")
def music(tmp_path_factory) -> Path:
    """Good songs and bad files, in a folder whose name plain Hydra cannot parse."""
    folder = tmp_path_factory.mktemp("disk") / "音 (1), it's [v] = 5%"
    folder.mkdir()
    for name in (*BAD, *GOOD):
        shutil.copy(HERE / "bad_audio" / name, folder)
    for name in DEMO:
        shutil.copy(cli.ROOT / "data/demo" / name, folder)
    return folder


@pytest.fixture(scope="module")
def preprocessed(start, music):
    return start("preprocess.py", f"dataset.dir={music}", "hardware=cpu")


@pytest.fixture(scope="module")
def trained(start, music, preprocessed):
    """Two steps and a sample; -> (process, output folder)."""
    folder = music.parent / "run (2), it's 音楽"
    options = ["trainer.max_steps=2", "dataset.crop_seconds=1", "dataset.custom_tag=nayutan, 星", "name=my run (1)"]
    options += ["trainer.accumulate_grad_batches=1", "logger=csv", "sample=true"]
    return start("train.py", f"dataset.dir={music}", "hardware=cpu", f"output_dir={folder}", *options), folder


def cells(text: str) -> dict[str, str]:
    """First cell of each row of a printed table -> its last cell, which may be folded."""
    rows, name = {}, ""
    for line in text.splitlines():
        if line.startswith("│"):
            first, *_, last = (cell.strip() for cell in line.strip("│").split("│"))
            name = first or name
            rows[name] = f"{rows.get(name, '')} {last}".strip()
    return rows


# ---------------------------------------------------------------- help


def test_help_is_quick_and_loads_no_torch(start):
    code = f"import runpy, sys; sys.argv = ['train.py', '--help']; sys.path.insert(0, {str(cli.ROOT)!r})\n"
    code += f"try: runpy.run_path({str(cli.ROOT / 'train.py')!r}, run_name='__main__')\n"
    code += "except SystemExit as end: print('loaded', end.code, 'torch' in sys.modules)\n"
    before, started = os.times(), time.monotonic()
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=60)
    after = os.times()
    assert done.stdout.endswith("loaded 0 False\n"), done.stderr
    assert "adapter: dora, loha, lokr, lora, none, oft, rslora" in done.stdout
    used = after.children_user + after.children_system - before.children_user - before.children_system
    assert min(used or 60, time.monotonic() - started) < 2


# ---------------------------------------------------------------- preprocess


def test_good_songs_are_processed_and_bad_files_listed(preprocessed, music):
    assert preprocessed.returncode == cli.LEFT_OUT, preprocessed.stderr
    assert f"{len(GOOD) + 1} songs in {music / '.acestep'}, {len(GOOD) + 1} of them made now" in preprocessed.stdout
    entries = {path.name.rpartition("-")[0] for path in (music / ".acestep").glob("*.safetensors")}
    assert entries == {name.rpartition(".")[0] for name in (*GOOD, "morning_tide.mp3")}
    table = cells(preprocessed.stdout)
    for name in (*GOOD, "morning_tide.mp3"):
        assert name in table
    for name in BAD:
        [reason] = [reason for row, reason in table.items() if row.endswith(name)]
        assert re.search("empty|not audio|no audio|too short", reason), (name, reason)


def test_second_run_encodes_nothing(preprocessed, music, configure, capsys):
    """In this process, which has what takes a command its time loaded already."""
    import preprocess

    entries = {path: path.stat().st_mtime_ns for path in (music / ".acestep").glob("*.safetensors")}
    preprocess.preprocess(configure("preprocess", f"dataset.dir={music}", "hardware=cpu"))
    assert f"{len(GOOD) + 1} songs in {music / '.acestep'}, 0 of them made now" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (music / ".acestep").glob("*.safetensors")} == entries


# ---------------------------------------------------------------- train


def test_training_ends_with_how_to_use_the_adapter(trained):
    done, folder = trained
    assert done.returncode == cli.LEFT_OUT, done.stderr
    assert {"config.yaml", "metrics.csv", "train.log", "checkpoints", "adapter", "samples"} <= {
        path.name for path in folder.iterdir()
    }
    assert f"adapter: {folder / 'adapter'}" in done.stdout
    [comfyui] = (folder / "adapter").glob("*_comfyui.safetensors")
    assert f"copy {comfyui} to models/loras" in done.stdout
    assert (folder / "adapter/pytorch_lora_weights.safetensors").is_file()
    assert not (folder.parent / "runs").exists()


# ---------------------------------------------------------------- generate


def test_adapter_makes_audio(start, trained, tmp_path):
    _, folder = trained
    out = tmp_path / "出力, (1)"
    done = start(
        "generate.py",
        f"adapter.path={folder}",
        "prompt=lofi, warm piano (live), 夜の音楽",
        "lyrics=@歌詞, (1).txt",
        "n=2",
        "seed=7",
        "duration=2.4",
        "compare=true",
        "format=flac",
        "hardware=cpu",
        f"output_dir={out}",
    )
    assert done.returncode == 0, done.stderr
    names = {"seed_7.flac", "seed_7_base.flac", "seed_8.flac", "seed_8_base.flac", "seeds_7-8.png"}
    assert {path.name for path in out.iterdir()} == names
    assert {Path(line).name for line in done.stdout.splitlines() if line.startswith(str(out))} == names
    assert "note: the prompt lacks the adapter's trigger tag 'nayutan, 星'" in done.stdout
    for name in names:
        if name.endswith("png"):
            assert matplotlib.image.imread(out / name).std() > 0.1
            continue
        audio, rate = soundfile.read(out / name)
        assert rate == 12000 and audio.shape == (2.4 * rate, 2) and np.abs(audio).max() > 0.5


def test_missing_adapter_gets_one_sentence(start):
    done = start("generate.py", "adapter.path=/nowhere/音楽, it's", "prompt=x", "hardware=cpu")
    assert done.returncode == 1 and done.stdout == ""
    [line] = done.stderr.splitlines()
    assert line.startswith("error: adapter.path=/nowhere/音楽, it's does not exist: ") and line.endswith(".")


# ---------------------------------------------------------------- sweeps


@pytest.fixture
def sweep(start, preprocessed, music):
    """sweep("adapter.r=2,4") -> (process, [(job, overrides, metric), ...] as printed)."""

    def run(*swept: str, folder: Path):
        options = ["trainer.max_steps=2", "dataset.crop_seconds=1", f"dataset.dir={music}", "hardware=cpu"]
        options += ["logger=csv", "sample=false", f"hydra.sweep.dir={folder}"]
        done = start("train.py", "-m", *swept, *options)
        table = done.stdout[done.stdout.index("jobs, best first") :]
        return done, re.findall(r"^│ (\d+) +│ (\S.*?) +│ (.*?) +│$", table, re.MULTILINE)

    return run


@pytest.mark.slow
def test_sweep_prints_its_jobs_best_first(sweep, tmp_path):
    folder = tmp_path / "sweep, (1)"
    done, rows = sweep("adapter=lora,dora,lokr", "optimizer.lr=1e-4,3e-4", folder=folder)
    assert done.returncode == 0, done.stderr
    assert sorted(row[0] for row in rows) == sorted(path.name for path in folder.glob("[0-9]")) == list("012345")
    swept = {f"adapter={kind} optimizer.lr={lr}" for kind in ("lora", "dora", "lokr") for lr in ("0.0001", "0.0003")}
    assert {row[1] for row in rows} == swept
    losses = [float(row[2]) for row in rows]
    assert losses == sorted(losses) and losses[0] < losses[-1]
    assert done.stdout.splitlines()[-1] == f"best: {folder / rows[0][0]}"
    for job in folder.glob("[0-9]"):
        assert (job / "adapter/adapter_model.safetensors").is_file()


def test_sweep_goes_on_after_jobs_that_cannot_run(sweep, tmp_path):
    """One is told an impossible rank, one finds its folder in use."""
    used = tmp_path / "1" / "train.log"
    used.parent.mkdir()
    used.write_text("mine", encoding="utf-8")
    done, rows = sweep("adapter.r=0,4,2,64", folder=tmp_path)
    assert done.returncode == 1
    assert "error: adapter.r must be a whole number from 1 to 4096, got 0." in done.stderr
    [refusal] = [line for line in done.stderr.splitlines() if line.startswith(f"error: {used.parent} is not empty")]
    assert "resume=auto" in refusal and "overwrite=true" in refusal and used.read_text(encoding="utf-8") == "mine"
    assert rows[2:] == [("0", "adapter.r=0", "failed"), ("1", "adapter.r=4", "failed")]
    assert {row[:2] for row in rows[:2]} == {("2", "adapter.r=2"), ("3", "adapter.r=64")}
    assert 0 < float(rows[0][2]) < float(rows[1][2])
    assert done.stdout.splitlines()[-1] == f"best: {tmp_path / rows[0][0]}"


def test_limits_speak_of_keys_that_there_are_and_the_defaults_keep_them(configure):
    commands = [path.stem for path in cli.CONF.glob("*.yaml") if path.stem not in ("evaluate", "report", "sweep")]
    known = [configure(command) for command in commands]
    known.append(configure("evaluate", "adapter.path=x"))
    for cfg in known:
        limits.check(cfg)
    for key in limits.WHOLE | limits.REAL:
        assert any(key in OmegaConf.to_container(cfg) or OmegaConf.select(cfg, key.rpartition(".")[0]) for cfg in known)


@pytest.mark.parametrize("key", sorted(limits.WHOLE | limits.REAL))
@pytest.mark.parametrize("value", ["abc", "true", ".nan", "1e400", "[1]", "-1e9"])
def test_what_is_no_number_is_told_by_its_key(key, value):
    cfg = OmegaConf.create()
    OmegaConf.update(cfg, key, OmegaConf.create(f"x: {value}").x)
    if value == "-1e9" and (limits.WHOLE | limits.REAL)[key][0] < -1e9 or value == "[1]" and key in limits.SEVERAL:
        return limits.check(cfg)
    with pytest.raises(UserError, match=f"^{re.escape(key)} must be a .*number.*, got"):
        limits.check(cfg)


@pytest.mark.parametrize("command, told", [
    ("generate.py prompt=null", "prompt is missing"),
    ("generate.py adapter.path=null adapter.scale=[1,x]", "adapter.scale must be a number, got x"),
    ("generate.py duration=1e9", "duration must be a number above 0, at most 600, got"),
    ("generate.py prompt=a duration=1 steps=1 hardware=cpu output_dir={file}", "{file} cannot be used"),
    ("-m acestep_lora.export inspect adapter.path={file}", "cannot be used as an adapter"),
])  # fmt: skip
def test_what_cannot_be_done_is_one_sentence(command, told, tmp_path):
    file = tmp_path / "file"
    file.touch()
    words = [sys.executable, *command.format(file=file).split()]
    done = subprocess.run(words, cwd=cli.ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"error: {told.format(file=file)}" in done.stderr or told in done.stderr.splitlines()[-1]


def test_an_error_of_a_file_is_told_and_any_other_is_a_bug_that_ends_no_sweep(tmp_path):
    code = """
from acestep_lora import cli
def run(cfg):
    print("ran", cfg.seed)
    errors = [OSError("no reason"), OSError(28, "No space left on device"), FileNotFoundError(2, "gone", "x")]
    if cfg.seed < 3:
        raise errors[cfg.seed]
    return 0.0
cli.main("train", run)
"""

    def do(*options: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", code, *options, f"hydra.sweep.dir={tmp_path}", f"hydra.run.dir={tmp_path}"]
        return subprocess.run(command, cwd=cli.ROOT, capture_output=True, text=True)

    one, all_of_them = do("seed=0"), do("-m", "seed=0,1,2,3")
    assert one.returncode == 1 and "Traceback" in one.stderr
    assert all_of_them.returncode == 1 and [f"ran {seed}" in all_of_them.stdout for seed in range(4)] == [True] * 4
    assert "error: a disk cannot be used (No space left on device)" in all_of_them.stderr
    assert "error: x cannot be used (gone)" in all_of_them.stderr


@pytest.mark.parametrize("option", ["dataset.batch_size=1.5", "seed=-1"])
def test_a_command_checks_its_numbers_first(option, tmp_path):
    done = subprocess.run(
        [sys.executable, "train.py", option, f"output_dir={tmp_path / 'out'}"],
        cwd=cli.ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and re.fullmatch(
        rf"error: {option.partition('=')[0]} must be .*, got .*", done.stderr.strip()
    )
    assert not (tmp_path / "out").exists()
