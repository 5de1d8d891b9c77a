"""What Windows and macOS do otherwise, done here: workers that are spawned, pipes without Unicode."""

import os
import shutil
import subprocess
import sys

from builders import write_songs

from acestep_lora import cli

QUICK = ["logger=csv", "hardware=cpu", "trainer.max_steps=3", "sample=false", "dataset.crop_seconds=1", "adapter.r=2"]


def test_spawned_workers_train_the_same_adapter_and_names_are_printed_anywhere(tmp_path, configure):
    """train.py as Windows runs it: each worker imports it anew, and the code page of a pipe has no emoji."""
    import train

    songs = tmp_path / "songs"
    for path, name in zip(write_songs(songs, 24_000, count=2), ["夜の🎹", "ümläut"], strict=True):
        path.rename(songs / f"{name}.wav")
    (songs / "夜の🎹.lyrics.txt").write_bytes("[Verse]\r\n夜のうた\r\n".encode("cp932"))
    (songs / "ümläut.caption.txt").write_bytes("\ufeffsoft piano\r\n".encode())
    shutil.copy(cli.ROOT / "tests/bad_audio/zero_byte.wav", songs / "🔇.wav")
    given = [*QUICK, f"dataset.dir={songs}"]
    (tmp_path / "sitecustomize.py").write_text(
        "import multiprocessing\nmultiprocessing.set_start_method('spawn', force=True)\n", encoding="utf-8"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "PYTHONIOENCODING": "cp932", "PYTHONUTF8": "0"}
    spawned = [
        "hardware.num_workers=2",
        f"output_dir={tmp_path / 'spawned'}",
        f"dataset.cache_dir={tmp_path / 'cache'}",
    ]
    done = subprocess.run(
        [sys.executable, "train.py", *given, *spawned],
        cwd=cli.ROOT,
        env=environment,
        capture_output=True,
        timeout=600,
    )
    printed = (done.stdout + done.stderr).decode("cp932")
    assert done.returncode == cli.LEFT_OUT and "Traceback" not in printed and "夜の?" in printed, printed
    alone = tmp_path / "alone"
    train.train(configure("train", *given, f"output_dir={alone}", f"dataset.cache_dir={tmp_path / 'other'}"), alone)
    file = "adapter/adapter_model.safetensors"
    assert (tmp_path / "spawned" / file).read_bytes() == (alone / file).read_bytes()
