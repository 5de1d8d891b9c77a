"""Several processes at one dataset: they wait, or are refused, and what they make is what one would have made."""

import os
import signal
import subprocess
import sys

import lightning as L
import pytest
from builders import write_songs
from safetensors.torch import load_file

from acestep_lora import runs
from acestep_lora.cli import ROOT
from acestep_lora.errors import UserError
from acestep_lora.locks import is_locked, locked

HOLD = """
import sys, time
from pathlib import Path
from acestep_lora.locks import locked
with locked(Path(sys.argv[1]), "busy"):
    print("held", flush=True)
    time.sleep(600)
"""


def preprocess(folder, cache, *options: str) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "preprocess.py"), f"dataset.dir={folder}", f"dataset.cache_dir={cache}"]
    command += ["hardware=cpu", *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_lock_does_not_outlive_its_process_however_that_ends(tmp_path):
    path = tmp_path / ".lock"
    assert not is_locked(path)
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    assert is_locked(path)
    with pytest.raises(UserError, match="busy"), locked(path, "busy"):
        pytest.fail("two hold it")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not is_locked(path)
    with locked(path, "busy"):
        assert is_locked(path)
    assert not is_locked(path)


def test_two_preprocessings_at_once_make_what_one_makes(tmp_path):
    songs, cache = tmp_path / "songs", tmp_path / "cache"
    songs.mkdir()
    write_songs(songs, 16000)
    both = [preprocess(songs, cache) for _ in range(2)]
    said = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sorted(int(text.split(" of them made now")[0].split()[-1]) for text in said) == [0, 3]
    alone = tmp_path / "alone"
    assert preprocess(songs, alone).wait() == 0
    made, wanted = (
        {path.name: path.read_bytes() for path in folder.glob("*.safetensors")} for folder in (cache, alone)
    )
    assert made.keys() == wanted.keys()
    for name in made:
        one, other = load_file(cache / name), load_file(alone / name)
        assert all((one[key] == other[key]).all() for key in one)
    assert not [path for path in cache.iterdir() if path.suffix in (".tmp", ".f32")]


def test_other_words_and_pruning_during_a_training_do_not_touch_it(run, tmp_path, monkeypatch):
    """It reads from the disk at every step (preload=false); a pruning is refused until it has ended."""
    cache, seen = tmp_path / "cache", []
    options = ("trainer.max_steps=4", "dataset.preload=false", f"dataset.cache_dir={cache}")
    _, alone = run(*options)

    class Meddle(L.Callback):
        def on_train_batch_start(self, trainer, *_) -> None:
            if trainer.global_step == 1 and not seen:
                process = preprocess(ROOT / "data/demo", cache, "dataset.custom_tag=other", "prune=true")
                seen.append((process.communicate()[1], process.returncode))

    original = runs.callbacks
    monkeypatch.setattr(runs, "callbacks", lambda *args: original(*args) | {"meddle": Meddle()})
    _, folder = run(*options)
    assert seen[0][1] == 1 and f"error: {cache} is in use by a training" in seen[0][0]
    name = "adapter/adapter_model.safetensors"
    assert (folder / name).read_bytes() == (alone / name).read_bytes()
    process = preprocess(ROOT / "data/demo", cache, "prune=true")
    assert "8 unused entries removed" in process.communicate()[0]
    assert not [path for path in cache.glob(".in-use*")]


def test_what_killed_processes_left_goes_when_the_next_one_writes(tmp_path):
    songs, cache = tmp_path / "songs", tmp_path / "cache"
    songs.mkdir()
    cache.mkdir()
    write_songs(songs, 16000, count=1)
    for name in (".0123.tmp", "tmpabc.f32"):
        (cache / name).write_bytes(os.urandom(9))
    assert preprocess(songs, cache).wait() == 0
    assert not [path for path in cache.iterdir() if path.suffix in (".tmp", ".f32")]
