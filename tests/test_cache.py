"""Cache entries: what is made again when, what is lent, what a damaged or hostile file does, the official .pt files."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import write_songs
from safetensors.torch import load_file, save_file
from test_filenames import acceptable

from acestep_lora import basemodel
from acestep_lora.conditioning import Conditioning
from acestep_lora.data import passes
from acestep_lora.data.cache import Cache, CacheError, Entry, audio_key, read_upstream, text_key
from acestep_lora.data.encode import AudioSettings, Encoder, Job
from acestep_lora.data.track import Track, scan
from acestep_lora.hashes import FileHashes

INFERENCE = Conditioning()
TRACK = Track(id="a.wav", path=Path("a.wav"))
TENSORS = {"latents.mean": torch.randn(5, 3), "latents.std": torch.rand(5, 3), "condition.caption": torch.randn(7, 4)}


def header(audio: str, text: str = "") -> dict[str, str]:
    return {"audio_key": audio, "duration": "0.2", "frames": "5"} | ({"text_key": text} if text else {})


def stored(cache: Cache, audio: str, text: str = "", track: Track = TRACK) -> Entry:
    return cache.write(cache.path(track, audio, text), TENSORS, header(audio, text))


# ---------------------------------------------------------------- entries


def test_entries_give_back_what_was_written(tmp_path):
    cache = Cache(tmp_path / "new folder")
    stored(cache, "a" * 64, "b" * 64)
    entry = cache.find(TRACK, "a" * 64, "b" * 64)
    assert entry.path == tmp_path / "new folder" / f"a-{'a' * 16}{'b' * 16}.safetensors"
    assert (entry.frames, entry.duration, sorted(entry.names)) == (5, 0.2, sorted(TENSORS))
    assert all(torch.equal(entry.read(name), value) for name, value in TENSORS.items())
    assert torch.equal(entry.read("latents.mean", 1, 4), TENSORS["latents.mean"][1:4])


def test_entries_are_found_by_both_whole_keys(tmp_path):
    """File names hold a quarter of each key; the header decides."""
    cache = Cache(tmp_path)
    audio, text = "a" * 64, "b" * 64
    stored(cache, audio, text)
    assert cache.find(TRACK, audio, "b" * 63 + "c") is None
    assert cache.find(TRACK, "a" * 63 + "c", text) is None
    assert cache.find(replace(TRACK, path=Path("other.wav")), audio, text) is None
    assert cache.lender("a" * 63 + "c") is None
    assert cache.lender(audio).path == cache.find(TRACK, audio, text).path


def test_a_lender_may_be_complete_or_not_and_named_otherwise(tmp_path):
    cache = Cache(tmp_path)
    assert cache.lender("a" * 64) is None
    alone = stored(cache, "a" * 64, track=replace(TRACK, path=Path("old-name - with dashes.wav")))
    assert cache.lender("a" * 64).path == alone.path
    alone.path.unlink()
    assert cache.lender("a" * 64) is None
    complete = stored(cache, "a" * 64, "b" * 64)
    assert cache.lender("a" * 64).path == complete.path
    elsewhere = stored(Cache(tmp_path), "c" * 64)  # by another process
    assert cache.lender("c" * 64) is None
    cache.forget()
    assert cache.lender("c" * 64).path == elsewhere.path


@pytest.mark.parametrize("left", [0, 4, 100, -1])
def test_a_truncated_entry_is_none(tmp_path, left):
    cache = Cache(tmp_path)
    entry = stored(cache, "a" * 64, "b" * 64)
    entry.path.write_bytes(entry.path.read_bytes()[:left])
    assert Entry.open(entry.path) is None
    assert cache.find(TRACK, "a" * 64, "b" * 64) is None and cache.lender("a" * 64) is None


@pytest.mark.parametrize("lost", ["latents.mean", "latents.std", "audio_key", "duration", "frames"])
def test_a_foreign_file_is_none(tmp_path, lost):
    names = header("a" * 64, "b" * 64)
    save_file(
        {name: value for name, value in TENSORS.items() if name != lost},
        tmp_path / "x.safetensors",
        metadata={name: value for name, value in names.items() if name != lost},
    )
    assert Entry.open(tmp_path / "x.safetensors") is None
    assert Entry.open(tmp_path / "nothing.safetensors") is None


def test_a_write_that_fails_midway_leaves_the_old_entry(tmp_path):
    """The disk is full, as the limit on a file's size plays it."""
    cache = Cache(tmp_path)
    resource = pytest.importorskip("resource")
    entry = stored(cache, "a" * 64, "b" * 64)
    before, limits = entry.path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(CacheError, match=r"Cannot write to .*: choose dataset\.cache_dir"):
            cache.write(entry.path, {"latents.mean": torch.zeros(10_000)}, header("a" * 64))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == [entry.path.name]
    assert entry.path.read_bytes() == before


@pytest.mark.skipif(os.name == "nt", reason="modes are POSIX's")
def test_entries_may_be_read_by_whom_the_umask_lets(tmp_path):
    before = os.umask(0o027)
    try:
        assert stored(Cache(tmp_path), "a" * 64).path.stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(CacheError, match="choose dataset.cache_dir"):
        Cache(tmp_path / "file" / "cache").create()
    with pytest.raises(CacheError, match="choose dataset.cache_dir"):
        stored(Cache(tmp_path / "file" / "cache"), "a" * 64)


def test_prune_removes_orphans_and_leftovers_alone(tmp_path):
    cache = Cache(tmp_path)
    kept, orphan, alone = stored(cache, "a" * 64, "b" * 64), stored(cache, "a" * 64, "c" * 64), stored(cache, "d" * 64)
    leftovers = [tmp_path / name for name in (".a-1.safetensors.99.tmp", ".tmpX1y2z3", "spool123.f32")]
    others = [tmp_path / name for name in ("files.json", "notes.txt")]
    for path in (*leftovers, *others):
        path.write_text("", encoding="utf-8")
    assert set(cache.prune({kept.path})) == {orphan.path, alone.path, *leftovers}
    assert set(tmp_path.iterdir()) == {kept.path, *others}
    assert cache.lender("d" * 64) is None and cache.lender("a" * 64).path == kept.path


# ---------------------------------------------------------------- names

RESERVED = [
    "CON",
    "nul.1",
    "COM1.live",
    "a.",
    "a. .",
    " a ",
    "...",
    "",
    "a/b",
    "a\\b",
    "C:x",
    "a*?<>|b",
    'say "hi"',
    "a\nb",
    "\x7f",
]
RESERVED += ["🎹" * 300, "音" * 300, "x" * 300, "é" * 119 + "音", "a" * 119 + "."]


@pytest.mark.parametrize("stem", RESERVED)
def test_hostile_stems_make_legal_names(tmp_path, stem):
    cache, track = Cache(tmp_path), replace(TRACK, path=Path(f"{stem}.wav"))
    entry = stored(cache, "a" * 64, "b" * 64, track)
    assert acceptable(entry.path.name)
    assert cache.find(track, "a" * 64, "b" * 64).path == entry.path
    assert [path.name for path in tmp_path.iterdir()] == [entry.path.name]


def test_plain_stems_stay(tmp_path):
    track = replace(TRACK, path=Path("music/01 春の海 (live) - take 2.flac"))
    assert Cache(tmp_path).path(track, "a" * 64).name == f"01 春の海 (live) - take 2-{'a' * 16}.safetensors"


# ---------------------------------------------------------------- keys


def test_keys_follow_everything_they_are_made_of():
    settings, texts = {"max_duration": None, "normalize": None}, [{"caption": "c"}, "l", [256]]
    audio = [
        audio_key("file", "vae", settings),
        audio_key("other", "vae", settings),
        audio_key("file", "other", settings),
        audio_key("file", "vae", settings | {"max_duration": 3.0}),
        audio_key("file", "vae", settings | {"normalize": "peak"}),
    ]
    text = [
        text_key(texts, "model", torch.float32, False),
        text_key([{"caption": "d"}, "l", [256]], "model", torch.float32, False),
        text_key(texts, "other", torch.float32, False),
        text_key(texts, "model", torch.bfloat16, False),
        text_key(texts, "model", torch.float32, True),
    ]
    assert len({*audio, *text}) == 10
    assert audio[0] == audio_key("file", "vae", dict(reversed(settings.items())))


# ---------------------------------------------------------------- songs that change


@pytest.fixture
def songs(tmp_path) -> Path:
    write_songs(tmp_path / "songs", rate=12000, count=3, seconds=0.6)
    return tmp_path / "songs"


@pytest.fixture
def preprocess(nano, songs, monkeypatch):
    """preprocess() -> its jobs and the names of the songs whose VAE and text passes were run for it."""
    made = {"vae": [], "text": []}
    windows, step = passes.encode_windows, passes.TextPass.predict_step
    monkeypatch.setattr(
        passes, "encode_windows", lambda vae, audio: made["vae"].append(audio.frames) or windows(vae, audio)
    )
    monkeypatch.setattr(
        passes.TextPass, "predict_step", lambda self, i: made["text"].append(self.jobs[i].track.id) or step(self, i)
    )

    def go(base=nano, conditioning=INFERENCE, dtype=torch.float32) -> tuple[list[Job], int, list[str]]:
        for names in made.values():
            names.clear()
        encoder = Encoder(base, Cache(songs / ".acestep"), conditioning, AudioSettings(), dtype)
        jobs = encoder.jobs(scan(songs).tracks)
        encoder.run(jobs, accelerator="cpu", devices=1)
        assert all(job.ready for job in jobs)
        return jobs, len(made["vae"]), sorted(made["text"])

    return go


def state(songs: Path) -> dict[str, tuple[int, int]]:
    files = (songs / ".acestep").glob("*.safetensors")
    return {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in files}


def latents(jobs: list[Job]) -> torch.Tensor:
    return torch.cat([job.entry.read(name) for job in jobs for name in ("latents.mean", "latents.std")])


def test_a_second_run_does_nothing(preprocess, songs, nano, monkeypatch):
    _, encoded, conditioned = preprocess()
    assert (encoded, conditioned) == (3, ["song_0.wav", "song_1.wav", "song_2.wav"])
    before = state(songs)
    assert len(before) == 3
    for name in ("load_vae", "load_text_encoder", "load_condition_encoder"):
        monkeypatch.setattr(basemodel, name, None)  # no model is even loaded
    assert preprocess()[1:] == (0, [])
    assert state(songs) == before


def test_a_changed_caption_makes_conditions_alone(preprocess, songs):
    first, *_ = preprocess()
    before = latents(first), state(songs)
    (songs / "song_1.caption.txt").write_text("ambient pads", encoding="utf-8")
    second, encoded, conditioned = preprocess()
    assert (encoded, conditioned) == (0, ["song_1.wav"])
    assert torch.equal(latents(second), before[0])
    assert second[1].entry.header["caption"] == "ambient pads"
    assert not torch.equal(second[1].entry.read("condition.caption"), first[1].entry.read("condition.caption"))
    assert before[1].items() <= state(songs).items() and len(state(songs)) == 4
    (songs / "song_1.caption.txt").unlink()
    assert preprocess()[1:] == (0, [])  # the old words are still there


def test_changed_audio_makes_a_new_entry(preprocess, songs):
    first, *_ = preprocess()
    shutil.copy(songs / "song_2.wav", songs / "song_0.wav")
    second, encoded, conditioned = preprocess()
    assert (encoded, conditioned) == (0, ["song_0.wav"])  # song 2 lends its latents
    write_songs(songs, rate=12000, count=1, seconds=0.7)
    third, encoded, conditioned = preprocess()
    assert (encoded, conditioned) == (1, ["song_0.wav"])
    assert len({jobs[0].audio_key for jobs in (first, second, third)}) == 3


def test_a_renamed_song_keeps_its_latents(preprocess, songs):
    first, *_ = preprocess()
    (songs / "song_0.wav").rename(songs / "song_9.wav")
    second, encoded, conditioned = preprocess()
    assert (encoded, conditioned) == (0, ["song_9.wav"])
    assert torch.equal(latents([first[0]]), latents([second[-1]]))


def test_another_condition_model_shares_latents_alone(preprocess, songs, nano, tmp_path):
    """Two models by turns: each finds its own conditions again, never the other's."""
    copy = shutil.copytree(nano.condition.parent, tmp_path / "other")
    weights = copy / "condition_encoder/diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["text_projector.weight"] *= 2
    save_file(tensors, weights)
    other = basemodel.find(str(copy), variant="nano", repo="acestep-lora")
    first, *_ = preprocess()
    second, encoded, conditioned = preprocess(other)
    assert (encoded, len(conditioned)) == (0, 3)
    assert torch.equal(latents(first), latents(second))
    for one, two in zip(first, second, strict=True):
        assert not torch.equal(one.entry.read("condition.caption"), two.entry.read("condition.caption"))
    for base, jobs in ((nano, first), (other, second)):
        again, encoded, conditioned = preprocess(base)
        assert (encoded, conditioned) == (0, [])
        assert [job.entry.path for job in again] == [job.entry.path for job in jobs]


def test_other_ways_of_conditioning_make_their_own_entries(preprocess):
    paths = [preprocess()[0][0].entry.path]
    for options in ({"lm_hints": 0.5}, {"silence_timbre": False}):
        jobs, encoded, conditioned = preprocess(conditioning=Conditioning(**options))
        assert (encoded, len(conditioned)) == (0, 3)
        paths.append(jobs[0].entry.path)
    jobs, encoded, _ = preprocess(dtype=torch.bfloat16)
    assert encoded == 0 and len({*paths, jobs[0].entry.path}) == 4
    assert preprocess(conditioning=Conditioning(lm_hints=0.9))[1:] == (0, [])  # another probability, the same entries


def test_a_damaged_entry_is_made_again(preprocess, songs):
    first, *_ = preprocess()
    expected = latents(first)
    damaged = first[1].entry.path
    damaged.write_bytes(damaged.read_bytes()[:-7])
    second, encoded, conditioned = preprocess()
    assert (encoded, conditioned) == (1, ["song_1.wav"])
    assert second[1].entry.path == damaged
    assert torch.equal(latents(second), expected)


def test_hashes_of_songs_are_remembered(preprocess, songs):
    """From the first run on, so that the next reads names and times only."""
    jobs, *_ = preprocess()
    known = FileHashes(songs / ".acestep/files.json").known
    assert known.keys() == {str(job.track.path.resolve()) for job in jobs}


def test_headers_carry_the_track_under_upstreams_names(preprocess, songs):
    (songs / "song_0.json").write_text('{"caption": "lofi", "bpm": 92, "keyscale": "Dm", "genre": "hiphop"}', "utf-8")
    jobs, *_ = preprocess()
    told = jobs[0].entry.header
    assert told["audio_path"] == str(songs / "song_0.wav") and told["filename"] == "song_0.wav"
    named = ("caption", "genre", "bpm", "keyscale", "timesignature", "language", "lyrics", "is_instrumental")
    expected = ["lofi", "hiphop", "92", "D minor", "", "unknown", "[Instrumental]", "true"]
    assert [told[name] for name in named] == expected
    assert told["audio_key"] == jobs[0].audio_key and told["text_key"] == jobs[0].text_key
    assert float(told["duration"]) == 7201 / 12000 and int(told["frames"]) == 15


# ---------------------------------------------------------------- the official trainer's .pt files


def upstream(**changes) -> dict:
    """What the official preprocessing saves for a song: 30 frames, 769 condition states of which 40 are real."""
    torch.manual_seed(0)
    data = {
        "target_latents": torch.randn(30, 48).bfloat16(),
        "attention_mask": torch.ones(30).bfloat16(),
        "encoder_hidden_states": torch.randn(769, 128).bfloat16(),
        "encoder_attention_mask": torch.arange(769) < 40,
        "context_latents": torch.randn(30, 96).bfloat16(),
        "metadata": {"caption": "lofi", "filename": "a.mp3", "bpm": 92, "preprocess_mode": "lora"},
    }
    data |= changes
    return {name: value for name, value in data.items() if value is not ...}


def test_upstream_tensors_are_cropped_by_mask(tmp_path):
    data = upstream()
    torch.save(data, tmp_path / "a.pt")
    tensors, metadata = read_upstream(tmp_path / "a.pt", 48)
    assert torch.equal(tensors["condition.caption"], data["encoder_hidden_states"][:40])
    assert torch.equal(tensors["latents.mean"], data["target_latents"].float())
    assert tensors["latents.std"].shape == (30, 48) and not tensors["latents.std"].any()
    assert metadata["caption"] == "lofi"


REFUSED = {
    "lokr": ({"metadata": {"preprocess_mode": "lokr"}}, "made for LoKr with the song itself as context"),
    "no latents": ({"target_latents": ...}, "it lacks target_latents"),
    "no mask": (
        {"encoder_attention_mask": ..., "encoder_hidden_states": ...},
        "lacks encoder_hidden_states, encoder_att",
    ),
    "no tensor": ({"target_latents": [1.0]}, "it lacks target_latents"),
    "flat": ({"target_latents": torch.zeros(30)}, r"\[T, 48\], got \[30\]"),
    "other model": ({"target_latents": torch.zeros(30, 64)}, r"\[T, 48\], got \[30, 64\]"),
    "NaN": ({"target_latents": torch.full((30, 48), torch.nan)}, "must be finite"),
    "mask of another length": (
        {"encoder_attention_mask": torch.ones(768)},
        r"mask \[768\] does not fit .* \[769, 128\]",
    ),
}


@pytest.mark.parametrize("changes, message", REFUSED.values(), ids=REFUSED)
def test_upstream_tensors_that_cannot_be_used(tmp_path, changes, message):
    torch.save(upstream(**changes), tmp_path / "a.pt")
    with pytest.raises(CacheError, match=f"a.pt.*{message}"):
        read_upstream(tmp_path / "a.pt", 48)


def test_metadata_is_optional(tmp_path):
    torch.save(upstream(metadata=...), tmp_path / "a.pt")
    assert read_upstream(tmp_path / "a.pt", 48)[1] == {}


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04" + b"\0" * 50])
def test_foreign_files_are_refused(tmp_path, content):
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(CacheError, match="a.pt is not a tensor file of the official trainer"):
        read_upstream(tmp_path / "a.pt", 48)


def test_code_in_a_pickle_is_not_executed(tmp_path):
    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save(upstream(metadata=Code()), tmp_path / "a.pt")
    with pytest.raises(CacheError, match="is not a tensor file of the official trainer: it holds something else"):
        read_upstream(tmp_path / "a.pt", 48)
    assert not (tmp_path / "executed").exists()
