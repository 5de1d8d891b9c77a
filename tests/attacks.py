"""Every parser of files that come from elsewhere as a function of one file's bytes, and ways to spoil such bytes.

test_fuzz.py drives them with hypothesis, cover.py with atheris.
"""

import io
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import builders
import numpy as np
import soundfile
import torch
from safetensors.torch import save

from acestep_lora import basemodel, cli
from acestep_lora.adapter_files import PEFT_FILE, check_fit
from acestep_lora.adapter_files import read as read_adapter
from acestep_lora.adapters import read_pattern
from acestep_lora.annotate import record
from acestep_lora.annotate.annotator import disagreements, known_fields, unreviewed
from acestep_lora.data import lines
from acestep_lora.data.audio import spool
from acestep_lora.data.cache import Cache, read_upstream
from acestep_lora.data.draws import Draw
from acestep_lora.data.encode import BadFiles
from acestep_lora.data.items import Song, TrainSongs, collate
from acestep_lora.data.sidecars import strip_lrc
from acestep_lora.data.track import Track, read_dataset_json, scan, write_dataset_json
from acestep_lora.dit import load_dit
from acestep_lora.errors import UserError
from acestep_lora.hashes import FileHashes
from acestep_lora.loggers import MetricsCSV
from acestep_lora.timesteps import Uniform

HERE = Path(__file__).parent
NANO = cli.ROOT / "data/models/nano"
GOLDEN = HERE / "goldens/original/acestep-v15-turbo"
ADAPTER = HERE / "goldens/adapters/lora_r4_a8"


@dataclass(frozen=True)
class Attack:
    """use(data): hands the bytes to a parser as a file. It returns, or raises UserError; anything else is a bug."""

    use: Callable[[bytes], None]
    seeds: tuple[bytes, ...]
    kind: str = "text"  # how to spoil a seed: text, json, safetensors, or bytes


def once(data: bytes, attack: Attack) -> bool:
    """Whether the bytes were of use; fails for an error that is not one sentence."""
    try:
        attack.use(data)
    except UserError as error:
        assert "\n" not in cli.sentence(error) and len(cli.sentence(error)) < 2000, error
        return False
    return True


@cache
def scratch() -> Path:
    return Path(tempfile.mkdtemp(prefix="attacks-"))


def folder(name: str) -> Path:
    """An empty folder."""
    path = scratch() / name
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    return path


@cache
def wav() -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.zeros((800, 1)), 8000, format="WAV")
    return file.getvalue()


# ---------------------------------------------------------------- beside the songs


def beside_a_song(name: str, data: bytes) -> None:
    """The song stays a track whatever lies beside it, and so does its neighbour, untouched."""
    here = folder("songs")
    for song in ("song.wav", "good.wav"):
        (here / song).write_bytes(wav())
    (here / "good.caption.txt").write_text("fine", encoding="utf-8")
    (here / name).write_bytes(data)
    found = scan(here)
    tracks = {track.path.stem: track for track in found.tracks}
    assert set(tracks) == {"song", "good"} and tracks["good"].caption == "fine"
    track = tracks["song"]
    write_dataset_json(found.tracks, here / "written.json")
    [again] = [one for one in read_dataset_json(here / "written.json").tracks if one.path.stem == "song"]
    assert (again.caption, again.bpm) == (track.caption, track.bpm)
    assert again.lyrics == (strip_lrc(track.lyrics) or track.lyrics)  # a stamp may be left inside another one
    try:
        timed = lines.read_lines(track.path)
        song = lines.align(track.lyrics, timed, 30.0)
        [lines.excerpt(song, start, start + 10.0) for start in (0.0, 5.0, 25.0)]
    except (ValueError, OSError):
        pass  # told as a remark on the song
    disagreements(track)
    unreviewed([track], "lyrics")
    known_fields(track)
    record.save(track.path, {"bpm": 120}, reviewed=True)


def dataset_json(data: bytes) -> None:
    here = folder("dataset")
    (here / "song.wav").write_bytes(wav())
    (here / "dataset.json").write_bytes(data)
    found = read_dataset_json(here / "dataset.json")
    write_dataset_json(found.tracks, here / "again.json")
    assert all(track.path.is_file() for track in found.tracks)


def audio(data: bytes) -> None:
    here = folder("audio")
    (here / "song.mp3").write_bytes(data)
    with spool(here / "song.mp3", 48_000, here) as song:
        assert np.isfinite(song.read()).all()


# ---------------------------------------------------------------- adapters


def adapter(data: bytes, name: str = PEFT_FILE) -> None:
    here = folder("adapter")
    for file in ADAPTER.iterdir():
        shutil.copy(file, here)
    (here / name).write_bytes(data)
    weights = read_adapter(here)
    check_fit(weights, golden_dit(), here)


def lone_adapter(data: bytes) -> None:
    path = folder("lone") / "mine.safetensors"
    path.write_bytes(data)
    check_fit(read_adapter(path), golden_dit(), path)


@cache
def golden_dit():
    return load_dit(GOLDEN)


def rank_pattern(data: bytes) -> None:
    path = scratch() / "ranks.yaml"
    path.write_bytes(data)
    assert all(isinstance(rank, int) for rank in read_pattern(str(path)).values())


# ---------------------------------------------------------------- base models


@cache
def upstream_model() -> Path:
    """A base model in upstream's layout."""
    return builders.base_model(scratch() / "upstream")


LOADED = {
    "transformer": lambda base: load_dit(base.dit),
    "condition_encoder": lambda base: (
        basemodel.load_condition_encoder(base, torch.float32, "cpu"),
        basemodel.constants(base),
    ),
    "vae": lambda base: basemodel.load_vae(base, torch.float32, "cpu"),
    "text_encoder": lambda base: basemodel.load_text_encoder(base, torch.float32, "cpu"),
    "tokenizer": lambda base: basemodel.load_text_encoder(base, torch.float32, "cpu"),
    "audio_tokenizer": lambda base: basemodel.load_audio_tokenizer(base, torch.float32, "cpu"),
}


def base_model(name: str, data: bytes) -> None:
    """A base model with one file of it replaced: found, checked, and that part of it loaded."""
    part, nano = name.split("/")[0], name.split("/")[0] in LOADED
    here = scratch() / ("nano" if nano else "upstream")
    if nano and not here.exists():
        shutil.copytree(NANO, here)
    file = here / name if nano else upstream_model() / builders.VARIANT / name
    good = file.read_bytes() if file.exists() else None
    file.write_bytes(data)
    try:
        base = basemodel.find(str(here), variant="nano" if nano else builders.VARIANT, repo="a/b")
        base.check()
        base.uses_timbre_token()
        for load in [LOADED[part]] if nano else [LOADED["transformer"], LOADED["condition_encoder"]]:
            load(base)
    finally:
        file.unlink() if good is None else file.write_bytes(good)


# ---------------------------------------------------------------- what runs leave


def cache_entry(data: bytes) -> None:
    """An entry is trained on, or it is none and made again."""
    here = folder("cache")
    track, audio_key, text_key = Track(id="a", path=Path("a.wav")), "a" * 64, "b" * 64
    path = Cache(here).path(track, audio_key, text_key)
    path.write_bytes(data)
    Cache(here).lender(audio_key)
    entry = Cache(here).find(track, audio_key, text_key)
    if entry:
        assert entry.duration >= 0
        for song in (Song(track, entry), Song(track, entry.in_memory())):
            songs = TrainSongs([song], 0, 4, Uniform(), False, 0.0, 50, 0.5)
            collate([songs[Draw(0, 0, position, 0, 1)] for position in range(3)])


def upstream_pt(data: bytes) -> None:
    path = folder("tensors") / "a.pt"
    path.write_bytes(data)
    tensors, metadata = read_upstream(path, 8)
    assert {name: tensor.ndim for name, tensor in tensors.items()}.keys() >= {"latents.mean", "condition.caption"}
    str(metadata.get("caption", ""))


def remembered(data: bytes) -> None:
    """What was remembered of files is forgotten where it makes no sense."""
    here = folder("hashes")
    for name in ("song.wav", "files.json", "bad.json"):
        (here / name).write_bytes(wav() if name == "song.wav" else data)
    assert len(FileHashes(here / "files.json").file(here / "song.wav")) == 64
    BadFiles(here / "bad.json").remember([])


def metrics(data: bytes) -> None:
    here = folder("run")
    (here / "metrics.csv").write_bytes(data)
    logger = MetricsCSV(here, resumed_step=3)
    logger.log_metrics({"loss": 1.0}, step=4)


# ---------------------------------------------------------------- all of them


def pt(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def _entry() -> bytes:
    tensors = {"latents.mean": torch.zeros(6, 3), "latents.std": torch.ones(6, 3)}
    tensors |= {"condition.caption": torch.zeros(5, 4), "condition.genre": torch.zeros(3, 4)}
    header = {"audio_key": "a" * 64, "text_key": "b" * 64, "duration": "0.24", "frames": "6"}
    return save(tensors, header)


def _windows() -> bytes:
    tensors = {"latents.mean": torch.zeros(6, 3), "latents.std": torch.ones(6, 3), "hints": torch.zeros(6, 3)}
    tensors |= {f"condition.caption{kind}@{i}": torch.zeros(5, 4) for i in (0, 1) for kind in ("", "_hint")}
    header = {"audio_key": "a" * 64, "text_key": "b" * 64, "duration": "0.24", "frames": "6", "windows": "[0, 1]"}
    return save(tensors, header)


def _upstream(**changes) -> dict:
    data = {"target_latents": torch.zeros(6, 8), "encoder_hidden_states": torch.zeros(5, 4)}
    data |= {"encoder_attention_mask": torch.ones(5), "metadata": {"caption": "lofi"}}
    return data | changes


SIDECAR = json.dumps(
    {"caption": "x", "bpm": "128 BPM", "key": "a min", "lyrics": "[Verse]\nla", "reviewed": ["bpm"], "language": "en"}
    | {"provenance": {"bpm": {"kind": "estimator", "provider": "p", "version": "1", "confidence": 0.5}}}
    | {"checks": {"bpm": {"value": 92, "provider": "p", "confidence": 0.9}, "keyscale": {"value": "C major"}}}
).encode()
DATASET = json.dumps(
    {"metadata": {"custom_tag": "tag", "tag_position": "append", "genre_ratio": 20}}
    | {"samples": [{"audio_path": "song.wav", "filename": "song.wav", "caption": "c", "bpm": 90, "labeled": True}]}
).encode()
LRC = b"[ar:x]\n[la:en]\n[offset:-20]\n[00:01.00]one <00:01.50>two\n[00:02.00][00:09.00]three\n[00:10]\n"
TIMED = json.dumps({"language": "ja", "lines": [{"start": 1.2, "end": 3.4, "text": "a"}, {"start": 4, "text": "b"}]})
CSV = "\ufeffFile;BPM;Key;Camelot;Caption\nsong.wav;120,5;Am;8A;x\nmissing.mp3;90;;8B;\n".encode()
TEXT = b"\xef\xbb\xbf[Verse 1]\r\nhello w\xc3\xb6rld\r\n\r\n[Chorus]\r\nla la\r\n"


@cache
def attacks() -> dict[str, Attack]:
    sidecars = {".json": (SIDECAR, "json"), ".txt": (b"bpm: 120\ncaption: x\nlyrics: a\nb", "text")}
    sidecars |= {".lyrics.txt": (TEXT, "text"), ".caption.txt": (b"line one\nline two", "text"), ".lrc": (LRC, "text")}
    sidecars |= {".lyrics.json": (TIMED.encode(), "json")}
    found = {f"song{s}": Attack(partial(beside_a_song, f"song{s}"), (seed,), k) for s, (seed, k) in sidecars.items()}
    found["table.csv"] = Attack(partial(beside_a_song, "table.csv"), (CSV,))
    found["dataset.json"] = Attack(dataset_json, (DATASET, b'["song.wav"]'), "json")
    found["audio"] = Attack(
        audio, tuple((HERE / "bad_audio" / f"ok{s}").read_bytes() for s in (".mp3", ".ogg")), "bytes"
    )
    found["adapter_config.json"] = Attack(
        partial(adapter, name="adapter_config.json"), ((ADAPTER / "adapter_config.json").read_bytes(),), "json"
    )
    found["adapter_model.safetensors"] = Attack(adapter, ((ADAPTER / PEFT_FILE).read_bytes(),), "safetensors")
    lokr = HERE / "goldens/adapters/lokr_d2_a4_f4/lokr_weights.safetensors"
    found["lokr_weights.safetensors"] = Attack(lone_adapter, (lokr.read_bytes(),), "safetensors")
    found["ranks.yaml"] = Attack(rank_pattern, (b"layers.0.self_attn.q_proj: 4\nlayers.1.mlp.up_proj: 0\n",))
    for part in ("transformer", "condition_encoder", "vae", "text_encoder", "audio_tokenizer"):
        name = f"{part}/config.json"
        found[name] = Attack(partial(base_model, name), ((NANO / name).read_bytes(),), "json")
    for name in ("tokenizer/tokenizer_config.json", "tokenizer/tokenizer.json"):
        found[name] = Attack(partial(base_model, name), ((NANO / name).read_bytes(),), "json")
    for name in ("transformer", "condition_encoder", "vae"):
        name = f"{name}/diffusion_pytorch_model.safetensors"
        found[name] = Attack(partial(base_model, name), ((NANO / name).read_bytes(),), "safetensors")
    weights = (NANO / "text_encoder/model.safetensors").read_bytes()
    found["text_encoder.safetensors"] = Attack(
        partial(base_model, "text_encoder/model.safetensors"), (weights,), "safetensors"
    )
    index = json.dumps({"weight_map": {"x": "model.safetensors"}, "metadata": {"total_size": 5}}).encode()
    upstream, config = upstream_model() / builders.VARIANT, json.dumps(builders.CONFIG).encode()
    silence = (upstream / "silence_latent.pt").read_bytes()
    found["config.json"] = Attack(partial(base_model, "config.json"), (config,), "json")
    found["index.json"] = Attack(partial(base_model, "model.safetensors.index.json"), (index,), "json")
    found["silence_latent.pt"] = Attack(partial(base_model, "silence_latent.pt"), (silence, pt([1])), "bytes")
    found["cache entry"] = Attack(cache_entry, (_entry(), _windows()), "safetensors")
    found["upstream.pt"] = Attack(upstream_pt, (pt(_upstream()), pt(_upstream(metadata={"caption": 5}))), "bytes")
    found["files.json"] = Attack(remembered, (b'{"a": [1, 2, "x"]}', b"[]", b'{"a": {}}'), "json")
    found["metrics.csv"] = Attack(metrics, (b"step,loss\n1,0.5\n2,0.25\n4,0.1\n",))
    return found
