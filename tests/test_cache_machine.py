"""The cache and the manifest of what is known, under any sequence of what users and crashes do to them."""

import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, precondition, rule

from acestep_lora.data.cache import Cache, CacheError, Entry
from acestep_lora.data.track import Track, read_dataset_json, write_dataset_json
from acestep_lora.hashes import FileHashes, damage, digest, seal

NAMES = st.sampled_from(["a", "b", "Ünïcode 日本", "CON", "with.dot", "x" * 140])
KEYS = st.integers(0, 3).map(lambda n: digest("key", n))
QUICK = settings(max_examples=25, stateful_step_count=20, deadline=None)


def tensors(text: str) -> dict[str, torch.Tensor]:
    return {"latents.mean": torch.zeros(3, 2), "latents.std": torch.ones(3, 2)} | (
        {"condition.caption": torch.full((2, 2), int(text[:4], 16) / 1.0)} if text else {}
    )


class CacheMachine(RuleBasedStateMachine):
    """Against a dictionary: what was written is found by its keys, whatever else happens; what is not whole is not."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.cache, self.known = Cache(self.folder), {}

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    def _track(self, name: str) -> Track:
        return Track(id=f"{name}.wav", path=Path(f"{name}.wav"))

    @rule(name=NAMES, audio=KEYS, text=KEYS | st.just(""))
    def write(self, name, audio, text):
        header = {"audio_key": audio, "duration": "0.1", "frames": "3"} | ({"text_key": text} if text else {})
        with self.cache.writing():
            path = self.cache.path(self._track(name), audio, text)
            self.cache.write(path, tensors(text), header)
        self.known[path] = (name, audio, text)

    @rule(name=NAMES, audio=KEYS, text=KEYS)
    def look(self, name, audio, text):
        entry = self.cache.find(self._track(name), audio, text)
        there = (name, audio, text) in self.known.values()
        assert (entry is not None) == there
        if there:
            assert torch.equal(entry.read("condition.caption"), tensors(text)["condition.caption"])

    @rule(audio=KEYS)
    def lend(self, audio):
        self.cache.forget()
        entry = self.cache.lender(audio)
        assert (entry is not None) == any(audio == key for _, key, _ in self.known.values())
        assert entry is None or entry.header["audio_key"] == audio

    @precondition(lambda self: self.known)
    @rule(data=st.data(), share=st.floats(0, 0.95))
    def tear(self, data, share):
        """A file that a full disk or a broken copy cut short."""
        path = data.draw(st.sampled_from(sorted(self.known)))
        os.truncate(path, int(path.stat().st_size * share))
        assert Entry.open(path) is None
        del self.known[path]

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def delete(self, data):
        path = data.draw(st.sampled_from(sorted(self.known)))
        path.unlink()
        del self.known[path]

    @rule(number=st.integers(0, 9))
    def crash(self, number):
        """What kill -9 leaves of a write and of a decoded song."""
        (self.folder / f".a.safetensors.{number}.tmp").write_bytes(b"half")
        (self.folder / f"tmp{number}.f32").write_bytes(b"half")

    @rule(data=st.data())
    def prune(self, data):
        keep = {path for path in sorted(self.known) if data.draw(st.booleans())}
        with self.cache.reading():
            with pytest.raises(CacheError, match="in use by a training"):
                self.cache.prune(keep)
        self.cache.prune(keep)
        self.known = {path: self.known[path] for path in keep}
        assert {path for path in self.folder.iterdir() if path.name != ".lock"} == keep

    @rule()
    def restart(self):
        self.cache = Cache(self.folder)

    @invariant()
    def every_whole_file_is_known(self):
        assert {path for path in self.folder.glob("*.safetensors") if Entry.open(path)} == set(self.known)


class SealMachine(RuleBasedStateMachine):
    """A sealed folder and remembered hashes against the bytes themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.folder, self.sealed = Path(tempfile.mkdtemp()), {}
        self.store = self.folder.with_suffix(".json")
        self.hashes, self.stamp = FileHashes(self.store), 10**18

    def teardown(self) -> None:
        shutil.rmtree(self.folder)
        self.store.unlink(missing_ok=True)

    files = st.sampled_from(["state.ckpt", "adapter.bin"])

    @rule(name=files, data=st.binary(max_size=40))
    def write(self, name, data):
        (self.folder / name).write_bytes(data)
        self.stamp += 1
        os.utime(self.folder / name, ns=(self.stamp, self.stamp))  # a clock that always goes on

    @rule(name=files)
    def delete(self, name):
        (self.folder / name).unlink(missing_ok=True)

    @rule()
    def seal(self):
        seal(self.folder)
        self.sealed = {path.name: path.read_bytes() for path in self.folder.iterdir() if path.suffix != ".json"}

    @rule(lost=st.booleans())
    def restart(self, lost):
        self.hashes.save()
        if lost:
            self.store.write_bytes(b"{not json")
        self.hashes = FileHashes(self.store)

    @invariant()
    def damage_is_any_difference(self):
        for name, data in self.sealed.items():
            path = self.folder / name
            assert (damage(path) is None) == (path.is_file() and path.read_bytes() == data)

    @invariant()
    def hashes_are_of_what_is_there(self):
        fresh = FileHashes(self.folder.with_suffix(".none"))
        for path in self.folder.iterdir():
            if path.suffix != ".json":
                assert self.hashes.file(path) == fresh.file(path)


class ManifestMachine(RuleBasedStateMachine):
    """dataset.json, written and read over and over while songs come, go and are renamed: nothing known is lost."""

    songs = Bundle("songs")

    def __init__(self) -> None:
        super().__init__()
        self.folder, self.tracks = Path(tempfile.mkdtemp()), {}

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    @initialize()
    def begin(self):
        self.file = self.folder / "dataset.json"

    @rule(
        target=songs,
        name=st.sampled_from(["one", "two", "three four", "日本"]),
        caption=st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=20).map(
            lambda text: " ".join(text.split())
        ),
        bpm=st.none() | st.integers(40, 200),
    )
    def add(self, name, caption, bpm):
        path = self.folder / f"{name}.wav"
        path.write_bytes(b"RIFF")
        self.tracks[name] = Track(
            id=path.name, path=path, caption=" ".join(caption.split()) or "x", bpm=bpm, duration=2.0
        )
        return name

    @rule(name=songs)
    def remove(self, name):
        if name in self.tracks:
            self.tracks.pop(name).path.unlink()

    @rule(name=songs, genre=st.sampled_from(["", "ambient", "日本 pop"]))
    def edit(self, name, genre):
        if name in self.tracks:
            self.tracks[name] = replace(self.tracks[name], genre=genre)

    @precondition(lambda self: self.tracks)
    @rule(times=st.integers(1, 2))
    def round_trip(self, times):
        tracks = list(self.tracks.values())
        for _ in range(times):
            write_dataset_json(tracks, self.file)
            tracks = read_dataset_json(self.file).tracks
        told = {track.path.name: (track.caption, track.bpm, track.genre) for track in tracks}
        assert told == {t.path.name: (t.caption, t.bpm, t.genre) for t in self.tracks.values()}


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = QUICK
TestSealMachine = SealMachine.TestCase
TestSealMachine.settings = QUICK
TestManifestMachine = ManifestMachine.TestCase
TestManifestMachine.settings = QUICK
