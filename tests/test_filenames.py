"""No name we write is refused by Windows, macOS or Linux; nothing is written through a link."""

import os
import re
import sys
from pathlib import Path

import pytest
from builders import write_songs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from acestep_lora import cli
from acestep_lora.annotate import record
from acestep_lora.conditioning import Conditioning
from acestep_lora.data.cache import Cache
from acestep_lora.data.datamodule import LatentDataModule
from acestep_lora.data.track import Track
from acestep_lora.errors import UserError
from acestep_lora.export import Options
from acestep_lora.filenames import LONGEST, legal
from acestep_lora.hashes import replacing

DEVICES = [f"{port}{digit}" for port in ("COM", "LPT") for digit in "0123456789¹²³"] + ["CON", "PRN", "AUX", "NUL"]
parts = st.sampled_from(
    [*DEVICES, *'<>:"/\\|?*', ".", " ", "..", "\x01", "\t", "\x7f", "é", "東京", "🎹", "a", "x" * 80]
)
texts = st.text() | st.lists(parts, max_size=6).map("".join)
any_text = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def acceptable(name: str) -> bool:
    """By the rules of Windows, which are the strictest, with room for a few letters more, and by UTF-8's."""
    return (
        not set(name) & set('<>:"/\\|?*')
        and all(ord(sign) >= 32 and not 0xD800 <= ord(sign) < 0xE000 for sign in name)
        and name.split(".")[0].strip().upper() not in DEVICES
        and name[0] != " "
        and name[-1] not in " ."
        and len(name.encode()) < 200
    )


@any_text
@given(texts, st.integers(8, 120))
def test_any_text_makes_a_name(text, most):
    name = legal(text, most)
    assert acceptable(name) and len(name.encode()) <= most and legal(name, most) == name


@pytest.mark.parametrize("text", ["nano-lora", "my style v1.0", "春の海 (live) - take 2", "it's, really; ok"])
def test_ordinary_names_stay(text):
    assert legal(text) == text


@any_text
@given(texts, st.integers(0, 180))
def test_cache_entries(text, depth):
    folder = Path("C:/") / ("d" * depth) if os.name == "nt" else Path("/" + "d" * depth)
    entry = Cache(folder).path(
        Track(id="a", path=Path(text.replace("/", "").replace("\0", "") + ".wav")), "a" * 64, "b" * 64
    )
    assert acceptable(entry.name) and len(str(entry)) <= LONGEST


@pytest.fixture(scope="module")
def output_dir(configure) -> str:
    """As train.yaml has it."""
    return OmegaConf.to_container(configure("train"))["output_dir"]


@any_text
@given(texts)
def test_run_folders_and_what_is_in_them(output_dir, text):
    cfg = OmegaConf.create({"output_dir": output_dir})
    OmegaConf.update(cfg, "name", text.replace("$", ""), force_add=True)
    runs, name, time = Path(cfg.output_dir).parts
    assert runs == "runs" and acceptable(name) and acceptable(time)
    assert acceptable(Options(text, base=None).file("comfyui"))
    checkpoint = (
        Path(cfg.output_dir) / "checkpoints/.epoch_999999-step_99999999/adapter" / Options(text, None).file("comfyui")
    )
    assert len(str(checkpoint)) < LONGEST - 40  # what is left for the folder that training was started in


@pytest.mark.parametrize("command", sorted(path.stem for path in cli.CONF.glob("*.yaml")))
def test_hydra_writes_no_folder_named_after_overrides(command):
    from hydra import compose, initialize_config_dir

    cli.register()
    with initialize_config_dir(str(cli.CONF), version_base="1.3"):
        hydra = compose(command, overrides=["+x='C:\\\\a|b,c'"], return_hydra_config=True).hydra
    assert hydra.output_subdir is None and hydra.run.dir == "."
    if command == "train":
        OmegaConf.update(hydra, "job.num", 12, force_add=True)
        assert all(acceptable(part) for part in Path(hydra.sweep.dir).parts) and str(hydra.sweep.subdir) == "12"


@any_text
@given(st.lists(texts, max_size=4))
def test_folders_named_after_overrides_by_the_user(output_dir, overrides):
    dirname = ",".join(overrides).replace("$", "").replace("\\", "")
    node = OmegaConf.create({"given": dirname, "subdir": "${filename:${given}}"})
    assert acceptable(node.subdir) and len(node.subdir.encode()) <= 40


@any_text
@given(texts.filter(lambda text: acceptable(f"a{text}a")))
def test_temporary_names_are_short(tmp_path, text):
    with replacing(tmp_path / f"a{text}a") as temporary:
        assert acceptable(temporary.name.lstrip(".")) and len(temporary.name) < 30
        temporary.touch()
    (tmp_path / f"a{text}a").unlink()


def test_temporary_names_are_not_foreseen(tmp_path):
    """A link that came with the songs and waits under the name of a temporary file would be written through."""
    seen = set()
    for _ in range(5):
        with replacing(tmp_path / "a.json") as temporary:
            temporary.touch()
            seen.add(temporary.name)
    assert len(seen) == 5 and not any(re.search(rf"\b{os.getpid()}\b", name) for name in seen)


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege on Windows")
def test_nothing_is_written_through_a_link_that_came_with_the_songs(tmp_path, nano):
    songs, precious = tmp_path / "songs", tmp_path / "precious"
    precious.mkdir()
    [song] = write_songs(songs, 8000, count=1)
    (songs / ".acestep").symlink_to(precious, target_is_directory=True)
    with pytest.raises(UserError, match="is a link, .* dataset.cache_dir"):
        LatentDataModule(base=nano, conditioning=Conditioning(), dir=str(songs))
    record.save(song, {"bpm": 90})
    with pytest.raises(UserError, match="is a link"):
        record.save(song, {"bpm": 120})  # the first one's copy would go there
    (songs / ".acestep").unlink()
    (songs / ".acestep").mkdir()
    (songs / ".acestep/backup").symlink_to(precious, target_is_directory=True)
    with pytest.raises(UserError, match="is a link"):
        record.save(song, {"bpm": 120})
    (song.with_suffix(".json")).unlink()
    (song.with_suffix(".json")).symlink_to(precious / "sidecar.json")
    (precious / "sidecar.json").write_text("{}", encoding="utf-8")
    (songs / ".acestep/backup").unlink()
    record.save(song, {"bpm": 120})
    assert {path.name: path.read_text() for path in precious.iterdir()} == {"sidecar.json": "{}"}
