"""The tutorial, in both languages: its commands do what it says, on thirteen songs."""

import json
import os
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import soundfile
from guides import code_blocks, commands, spans, text
from safetensors.torch import load_file

from acestep_lora import cli
from acestep_lora.annotate import record
from acestep_lora.data.track import scan
from acestep_lora.errors import UserError

HERE = Path(__file__).parent
TUTORIALS = {"English": cli.ROOT / "docs/tutorial.md", "Japanese": cli.ROOT / "docs/tutorial.ja.md"}


def test_both_languages_say_the_same():
    english, japanese = TUTORIALS.values()
    assert code_blocks(english) == code_blocks(japanese) and len(commands(code_blocks(english))) == 8
    assert sorted(spans(english)) == sorted(spans(japanese))
    for mark in ("\n## ", "\n| ", "]("):
        assert text(english).count(mark) == text(japanese).count(mark), mark
    names = [path.name for path in TUTORIALS.values()]
    for guide, other in zip(TUTORIALS.values(), reversed(names), strict=True):
        assert f"({other})" in text(guide)


# ---------------------------------------------------------------- extras that are not installed


@pytest.mark.parametrize(
    "provider, module",
    [
        ("transcriber=whisper_api", "openai"),
        ("captioner=openai", "openai"),
        ("structure=openai", "openai"),
        ("captioner=gemini", "google.genai"),
        ("transcriber=elevenlabs", "elevenlabs"),
    ],
)
def test_services_without_their_sdk_name_the_extra(monkeypatch, tmp_path, configure, provider, module):
    import annotate

    shutil.copy(HERE / "bad_audio/ok.ogg", tmp_path / "song.ogg")
    (tmp_path / "song.lyrics.txt").write_text("la la\n", encoding="utf-8")
    for name in [name for name in sys.modules if f"{name}.".startswith(f"{module}.")] + [module]:
        monkeypatch.setitem(sys.modules, name, None)
    for key in ("OPENAI_API_KEY", "GEMINI_API_KEY", "ELEVENLABS_API_KEY"):
        monkeypatch.setenv(key, "a key")
    cfg = configure("annotate", f"dataset.dir={tmp_path}", "tempo_key=none", "transcriber=none", provider,
                    "policy=check", "report=null")  # fmt: skip
    (reasons,) = annotate.annotate(cfg).failed.values()
    assert f"needs {module}" in reasons[0] and 'pip install "acestep-lora[annotate]"' in reasons[0]


def test_studio_without_gradio_names_the_extra(monkeypatch, tmp_path, configure):
    from acestep_lora.studio import __main__ as studio

    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "acestep_lora.studio.page", raising=False)
    with pytest.raises(UserError, match=r'studio needs gradio: pip install "acestep-lora\[studio\]"'):
        studio.main(configure("studio", f"dataset.dir={tmp_path}"))


# ---------------------------------------------------------------- the worked example

SUNG = {
    "morning_tide": [(0.0, "Morning tide, roll in slow,"), (5.2, "wash the stars away")],
    "paper_lanterns": [(0.0, "かみの あかり"), (3.7, "かぜに ゆれて")],
    "little_harbour": [(0.0, "Harbour lights aglow,"), (2.86, "wait for me below")],
    "glass_garden": [(0.0, "In the glass garden,"), (4.8, "nothing ever leaves")],
    "lift_voice": [(0.9, "Lift ev'ry voice and sing,"), (4.1, "till earth and heaven ring")],
    "aloha_isle": [(0.4, "Farewell to thee,"), (4.5, "farewell to thee")],
    "jeanie_light": [(0.1, "I dream of Jeannie"), (4.2, "with the light brown hair")],
}
PUBLIC_DOMAIN = {"lift_voice": (76, "Ab major"), "aloha_isle": (88, "A major"), "jeanie_light": (116, "F major")}
COMPOSED = {"thirteenth_street": 3, "still_counting": 2}  # seeds of data/procedural
DOUBLED = "little_harbour"  # its BPM in the table is twice what it is
REHEARSAL = {
    "preprocess": ["hardware=cpu"],
    "train": ["trainer.max_steps=4", "dataset.crop_seconds=3", "hardware=cpu"],
    "generate": ["duration=3", "hardware=cpu"],
    "studio": ["port=0"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """/music/mine: thirteen songs, LRC lyrics where somebody sings, the table of Key-BPM-Finder, no caption."""
    home = tmp_path_factory.mktemp("home of 音楽") / "music (mine)"
    home.mkdir()
    truth = json.loads((cli.ROOT / "data/demo/ground_truth.json").read_text(encoding="utf-8"))
    rows = [(song["file"], song["bpm"] * (1 + song["file"].startswith(DOUBLED)), song["keyscale"]) for song in truth]
    for name, *_ in rows:
        shutil.copy(cli.ROOT / "data/demo" / name, home)
    for name, known in PUBLIC_DOMAIN.items():
        samples, rate = soundfile.read(HERE / f"music/{name}.ogg", frames=8 * 22050)
        soundfile.write(home / f"{name}.flac", samples, rate)
        rows.append((f"{name}.flac", *known))
    sys.path.insert(0, str(cli.ROOT / "data"))
    from procedural import song

    for name, seed in COMPOSED.items():
        samples, score = song(seed, 22050, seconds=(7, 9))
        soundfile.write(home / f"{name}.wav", samples, 22050)
        rows.append((f"{name}.wav", score.bpm, score.keyscale))
    for name, lines in SUNG.items():
        stamped = [f"[00:{start:05.2f}]{line}" for start, line in lines]
        stamped = stamped if name == "paper_lanterns" else ["[la:en]", *stamped]
        (home / f"{name}.lrc").write_text("\n".join(["[ar:Nobody]", *stamped]) + "\n", encoding="utf-8")
    table = ["File,Artist,Title,BPM,Key,Camelot", *(f"{name},,,{bpm},{key}," for name, bpm, key in rows)]
    (home / "key_bpm.csv").write_text("\n".join(table) + "\n", encoding="utf-8")
    (home.parent / "words.txt").write_text("[Verse 1]\nLanterns on the water\n", encoding="utf-8")
    return home


def start(name: str, arguments: list[str], folder: Path) -> subprocess.Popen:
    """A command of the tutorial as a rehearsal on the songs in `folder`, started beside it."""
    script = cli.ROOT / f"{name}.py"
    run = [str(script)] if script.is_file() else ["-m", f"acestep_lora.{name}"]
    words = [word.replace("/music/mine", str(folder)) for word in arguments if not word.startswith("model.path=")]
    words = ["model=nano" if word == "model=turbo" else word for word in words]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1"}
    environment |= {"PYTHONIOENCODING": "utf-8"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "encoding": "utf-8"}
    command = [sys.executable, *run, *words, *REHEARSAL.get(name, [])]
    return subprocess.Popen(command, cwd=folder.parent, env=environment, **pipes)


def visited(studio: subprocess.Popen) -> str:
    """The page of the studio, which is ended then."""
    try:
        with urllib.request.urlopen(studio.stdout.readline().split()[1], timeout=60) as page:
            return page.read().decode()
    finally:
        studio.terminate()
        studio.communicate()


def planned(folder: Path, said: str) -> None:
    assert "together" in said and "13 songs" in said


def annotated(folder: Path, said: str) -> None:
    tracks = {track.path.stem: track for track in scan(folder).tracks}
    assert len(tracks) == 13 and all(track.bpm and track.keyscale and track.timesignature for track in tracks.values())
    assert {name for name, track in tracks.items() if not track.is_instrumental} == set(SUNG)
    assert {record.read(track.path).provenance("caption")["provider"] for track in tracks.values()} == {"rule_based"}
    for name, lines in SUNG.items():
        found = record.read_lines(tracks[name].path)
        assert [(line.start, line.text) for line in found] == lines
    assert {name: tracks[name].language for name in SUNG} == {
        name: "ja" if "lanterns" in name else "en" for name in SUNG
    }
    assert tracks[DOUBLED].bpm == 252 and "estimate says 126 (half), not 252" in said
    assert (folder / "report.html").is_file()


def counted(folder: Path, said: str) -> None:
    assert "gemini: 13 calls" in said


def opened(folder: Path, said: str) -> None:
    """The page is there; and what its Save writes when a person has tapped the right tempo."""
    assert "gradio" in said
    record.save(folder / f"{DOUBLED}.wav", {"bpm": 126}, reviewed=True)


def preprocessed(folder: Path, said: str) -> None:
    assert "13 songs in" in said and "13 of them made now" in said
    assert len(list((folder / ".acestep").glob("*.safetensors"))) == 13
    assert {track.path.stem: track.bpm for track in scan(folder).tracks}[DOUBLED] == 126


def trained(folder: Path, said: str) -> None:
    run = folder.parent / "runs/mine"
    assert f"adapter: {run.relative_to(folder.parent) / 'adapter'}" in said
    adapter = load_file(run / "adapter/adapter_model.safetensors")
    assert any(tensor.abs().max() > 0 for name, tensor in adapter.items() if "lora_B" in name)
    files = {path.name for path in (run / "adapter").iterdir()}
    assert {"adapter_config.json", "nano-lora_comfyui.safetensors", "pytorch_lora_weights.safetensors"} <= files
    assert len(list((run / "samples").glob("*.wav"))) == 4


def trained_on_crops(folder: Path, said: str) -> None:
    """Each crop has conditions of its own, so text is encoded anew, and audio is not."""
    assert "text and condition encoders:" in said and "VAE:" not in said
    assert (folder.parent / "runs/mine_crops/adapter/adapter_model.safetensors").is_file()


def generated(folder: Path, said: str) -> None:
    clips = [soundfile.read(folder.parent / line)[0] for line in said.splitlines() if line.endswith(".wav")]
    assert len(clips) == 2 and clips[0].shape == clips[1].shape and (clips[0] != clips[1]).any()
    assert min(clip.std() for clip in clips) > 1e-4


OUTCOMES = [planned, annotated, counted, opened, preprocessed, trained, trained_on_crops, generated]


@pytest.mark.slow
def test_the_worked_example_from_thirteen_songs_to_the_apps(folder, monkeypatch):
    """Every command of the tutorial, in its order, then its diffusers example on nano and the CPU."""
    blocks = code_blocks(TUTORIALS["English"])
    for (name, arguments), check in zip(commands(blocks), OUTCOMES, strict=True):
        process = start(name, arguments, folder)
        if name == "studio":
            said = visited(process)
        else:
            said, complaints = process.communicate(timeout=600)
            assert process.returncode == 0, complaints
        check(folder, said)
    (example,) = (block for block in blocks if block.startswith("```python"))
    for placeholder, value in {
        "models/turbo-diffusers": str(cli.ROOT / "data/models/nano"),
        '.to("cuda")': "",
        "bfloat16": "float32",
        "audio_duration=60.0": "audio_duration=2.0",
    }.items():
        assert placeholder in example
        example = example.replace(placeholder, value)
    monkeypatch.chdir(folder.parent)
    exec(example.strip("`").removeprefix("python"), {})
    assert soundfile.info("song.wav").duration == pytest.approx(2, abs=0.2)
