"""Cached songs -> batches: every item once, the same whatever cuts the epoch, and nothing seen that is padding."""

import json
import pickle
import shutil
from collections import Counter
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from builders import VARIANT, base_model, write_songs
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from acestep_lora import basemodel
from acestep_lora.conditioning import Conditioning
from acestep_lora.data import datamodule
from acestep_lora.data.cache import Cache, CacheError, Entry
from acestep_lora.data.datamodule import DatasetError, LatentDataModule, ResumableLoader
from acestep_lora.data.draws import Draw, EpochOrder
from acestep_lora.data.encode import Encoder, Job
from acestep_lora.data.fields import INSTRUMENTAL
from acestep_lora.data.items import VAL_TIMESTEPS, Batch, Song, TrainSongs, collate
from acestep_lora.data.passes import TextPass
from acestep_lora.data.track import Track
from acestep_lora.errors import UserError
from acestep_lora.module import FlowModule
from acestep_lora.timesteps import LogitNormal, Uniform

HERE = Path(__file__).parent
CHANNELS = 3
ALONE = SimpleNamespace(global_rank=0, world_size=1)
"""What the data module asks of a Trainer, on one device."""


def unread_song(i: int, frames: int, repeat: int = 1, audio: str = "") -> Song:
    """A song whose tensors nobody reads."""
    entry = Entry(Path(f"{i}"), {"frames": str(frames), "duration": "1", "audio_key": audio or str(i)}, frozenset())
    return Song(Track(id=f"{i}", path=Path(f"{i}"), repeat=repeat), entry)


def train_songs(songs: list[Song], seed: int = 0, **options) -> TrainSongs:
    defaults = {"crop_frames": None, "timesteps": Uniform(), "stratify": False, "condition_dropout": 0.0}
    return TrainSongs(songs, seed, **defaults | {"genre_ratio": 0, "lm_hints": 0.0} | options)


@pytest.fixture(scope="module")
def songs(tmp_path_factory) -> list[Song]:
    """Five songs whose latents are their frames' numbers; caption states are 1, genre 2, and 11, 12 for hints."""
    cache, made = Cache(tmp_path_factory.mktemp("cache")), []
    for i, frames in enumerate((4, 9, 20, 33, 50)):
        names = ["caption", "caption_hint"] + (["genre", "genre_hint"] if i != 3 else [])
        numbers = torch.arange(float(frames))[:, None].expand(-1, CHANNELS)
        values = {"caption": 1.0, "genre": 2.0, "caption_hint": 11.0, "genre_hint": 12.0}
        tensors = {f"condition.{name}": torch.full((5 + i, 4), values[name]) for name in names}
        tensors |= {"latents.mean": numbers, "latents.std": torch.zeros(frames, CHANNELS), "hints": -numbers}
        track = Track(id=f"song {i}", path=Path(f"song {i}.wav"))
        header = {"audio_key": f"{i}" * 64, "duration": f"{frames / 25}", "frames": f"{frames}"}
        entry = cache.write(cache.path(track, header["audio_key"]), tensors, header)
        made.append(Song(track, entry))
    return made


def same(one, two) -> bool:
    """Equal batches, or equal items."""
    if isinstance(one, Batch):
        one, two = ({field.name: getattr(batch, field.name) for field in fields(Batch)} for batch in (one, two))
    return one.keys() == two.keys() and all(
        torch.equal(value, two[name]) if isinstance(value, Tensor) else value == two[name]
        for name, value in one.items()
    )


# ---------------------------------------------------------------- order

datasets = st.lists(st.tuples(st.integers(1, 200), st.integers(1, 3)), min_size=1, max_size=20).map(
    lambda sizes: [unread_song(i, frames, repeat) for i, (frames, repeat) in enumerate(sizes)]
)
cuts = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))


def epoch(dataset: TrainSongs, cut: tuple[int, int, int], number: int = 0) -> list[list[list[Draw]]]:
    """Each rank's batches, (batch_size, accumulate, world) being the cut."""
    batch_size, accumulate, world = cut
    orders = [EpochOrder(dataset, batch_size, accumulate, rank, world) for rank in range(world)]
    for order in orders:
        order.set_epoch(number)
    batches = [list(order) for order in orders]
    assert [len(each) for each in batches] == [len(order) for order in orders]
    return batches


def steps(ranks: list[list[list[Draw]]], accumulate: int) -> list[list[Draw]]:
    """What each optimizer step trains on, over all ranks, without what idle ranks repeat."""
    found = []
    for first in range(0, len(ranks[0]), accumulate):
        draws = [draw for rank in ranks for batch in rank[first : first + accumulate] for draw in batch]
        found.append(sorted((draw for draw in draws if draw.weight), key=lambda draw: draw.position))
    return found


@given(datasets, cuts, st.integers(0, 99))
def test_every_item_once_per_epoch(songs, cut, number):
    ranks = epoch(train_songs(songs), cut, number)
    assert len({len(rank) for rank in ranks}) == 1  # ranks step together
    draws = [draw for rank in ranks for batch in rank for draw in batch]
    real = [draw for draw in draws if draw.weight]
    assert Counter(draw.track for draw in real) == {i: song.track.repeat for i, song in enumerate(songs)}
    assert sorted(draw.position for draw in real) == list(range(len(real)))
    assert {draw.epoch for draw in draws} == {number} and {draw.weight for draw in draws} <= {0.0, 1.0}
    assert all(1 <= len(batch) <= cut[0] for rank in ranks for batch in rank)
    assert len(draws) - len(real) < cut[2]


@given(datasets, cuts)
def test_windows_know_themselves(songs, cut):
    """`window` counts the items of the optimizer step, `slot` numbers them; only the last may be smaller."""
    found = steps(epoch(train_songs(songs), cut), cut[1])
    for step in found:
        assert {draw.window for draw in step} == {len(step)}
        assert [draw.slot for draw in step] == list(range(len(step)))
    sizes = [len(step) for step in found]
    assert set(sizes[:-1]) <= {cut[0] * cut[1] * cut[2]} and 0 < sizes[-1] <= cut[0] * cut[1] * cut[2]


@given(datasets, st.sampled_from([2, 4, 6, 8, 12]), st.integers(0, 9))
def test_steps_do_not_depend_on_how_they_are_dealt(songs, size, number):
    dataset = train_songs(songs)
    ways = [(b, a, size // b // a) for b in range(1, size + 1) for a in range(1, size + 1) if size % (b * a) == 0]
    first, *others = (steps(epoch(dataset, way, number), way[1]) for way in ways)
    assert all(other == first for other in others)


def test_epochs_and_seeds_differ_and_repeat():
    songs = [unread_song(i, 10 + i % 7) for i in range(30)]
    orders = [epoch(train_songs(songs, seed), (2, 2, 1), number) for seed in (0, 1) for number in (0, 1)]
    assert len({str([draw.track for batch in order[0] for draw in batch]) for order in orders}) == 4
    assert epoch(train_songs(songs, 1), (2, 2, 1), 1) == orders[3]


def test_batches_hold_songs_of_like_length_in_any_order():
    """Little padding, though windows of short and of long songs come as they may."""
    lengths = torch.randint(100, 5000, (400,), generator=torch.Generator().manual_seed(0)).tolist()
    dataset = train_songs([unread_song(i, length) for i, length in enumerate(lengths)])
    ((batches),) = epoch(dataset, (4, 2, 1))
    longest = [max(lengths[draw.track] for draw in batch) for batch in batches]
    assert 1 - sum(lengths) / sum(4 * length for length in longest) < 0.15
    trend = torch.corrcoef(torch.tensor([longest, list(range(len(longest)))], dtype=torch.float))
    assert trend[0, 1].abs() < 0.4


def test_the_partial_window_may_hold_any_song():
    """Not the longest ones time and again, whose gradient would then always be that of a smaller step."""
    dataset = train_songs([unread_song(i, 10 + 10 * i) for i in range(10)])
    last = Counter(draw.track for number in range(200) for draw in steps(epoch(dataset, (1, 4, 1), number), 4)[-1])
    assert set(last) == set(range(10)) and max(last.values()) < 80  # each in about 40


@given(datasets, cuts)
def test_padding_is_that_of_the_batches(songs, cut):
    dataset = train_songs(songs)
    lengths = [[dataset.length(draw.track) for draw in batch] for rank in epoch(dataset, cut) for batch in rank]
    padded = sum(max(batch) - length for batch in lengths for length in batch)
    expected = padded / (padded + sum(map(sum, lengths)))
    assert EpochOrder(dataset, *cut[:2], 0, cut[2]).padding() == pytest.approx(expected)


def test_crops_make_long_songs_alike():
    dataset = train_songs([unread_song(0, 10), unread_song(1, 99)], crop_frames=25)
    assert [dataset.length(0), dataset.length(1)] == [10, 25]


# ---------------------------------------------------------------- items


def draws(track: int, count: int, window: int = 1) -> list[Draw]:
    return [Draw(track, number, number * 7 % 50, number % window, window) for number in range(count)]


def test_crops_are_in_range_and_of_neighbouring_frames(songs):
    dataset = train_songs(songs, crop_frames=8, lm_hints=1.0)
    starts = set()
    for draw in draws(2, 200):
        item = dataset[draw]
        start = int(item["latents"][0, 0])
        starts.add(start)
        expected = torch.arange(start, start + 8.0)[:, None].expand(-1, CHANNELS)
        assert torch.equal(item["latents"], expected) and torch.equal(item["hints"], -expected)
        assert item["noise"].shape == (8, CHANNELS)
    assert starts == set(range(13))
    assert len(dataset[Draw(0, 0, 0, 0, 1)]["latents"]) == 4  # shorter than the crop: whole


def test_latents_are_samples_of_the_posterior(tmp_path):
    mean, std = torch.randn(1, CHANNELS) * 3, torch.tensor([[0.1, 1.0, 2.0]])
    tensors = {"latents.mean": mean.expand(50, -1), "latents.std": std.expand(50, -1)}
    tensors["condition.caption"] = torch.ones(1, 4)
    track = Track(id="a", path=Path("a.wav"))
    header = {"audio_key": "a", "duration": "2", "frames": "50"}
    entry = Cache(tmp_path).write(tmp_path / "a.safetensors", tensors, header)
    dataset = train_songs([Song(track, entry)])
    items = [dataset[draw] for draw in draws(0, 100)]
    samples, noise = (torch.cat([item[name] for item in items]) for name in ("latents", "noise"))
    assert ((samples.mean(0) - mean[0]).abs() < 4 * std[0] / 5000**0.5).all()
    torch.testing.assert_close(samples.std(0), std[0], rtol=0.05, atol=0)
    torch.testing.assert_close(noise.std(0), torch.ones(3), rtol=0.05, atol=0)
    correlation = torch.corrcoef(torch.cat([samples, noise], dim=1).T)
    assert (correlation - torch.eye(6)).abs().max() < 0.06


def test_items_are_functions_of_seed_epoch_position_and_track(songs):
    dataset = train_songs(songs, crop_frames=8, condition_dropout=0.5)
    draw = Draw(4, epoch=3, position=17, slot=0, window=1)
    item = dataset[draw]
    assert same(item, train_songs(songs, crop_frames=8, condition_dropout=0.5)[draw])
    dealt_otherwise = dataset[replace(draw, slot=5, window=8)]
    assert same(item | {"window": 8}, dealt_otherwise)
    others = [dataset[replace(draw, epoch=4)], dataset[replace(draw, position=18)]]
    others.append(train_songs(songs, seed=1, crop_frames=8)[draw])
    others.append(train_songs([*songs[:4], replace_id(songs[4], "other")], crop_frames=8)[draw])
    assert all(not torch.equal(item["noise"], other["noise"]) and item["t"] != other["t"] for other in others)
    assert len({item["key"], others[0]["key"], others[1]["key"], others[2]["key"]}) == 4


def replace_id(song: Song, id: str) -> Song:
    return replace(song, track=replace(song.track, id=id))


def test_an_idle_ranks_item_weighs_nothing(songs):
    dataset = train_songs(songs)
    assert dataset[Draw(0, 0, 0, 0, 1)]["weight"] == 1.0
    assert dataset[Draw(0, 0, 0, 0, 1, weight=0.0)]["weight"] == 0.0
    ranks = epoch(dataset, (2, 1, 2))  # five songs: the last window has one
    weights = [collate([dataset[draw] for draw in rank[-1]]).weight.tolist() for rank in ranks]
    assert weights == [[1.0], [0.0]]


def share(dataset: TrainSongs, track: int, value: float, count: int = 400) -> float:
    """How often a song is given the condition that holds `value`."""
    return sum(dataset[draw]["condition"].mean() == value for draw in draws(track, count)) / count


def test_genres_are_drawn_anew_each_time(songs):
    dataset = train_songs(songs, genre_ratio=30)
    assert 0.22 < share(dataset, 0, 2.0) < 0.38
    assert share(dataset, 3, 1.0, 50) == 1  # no genre: caption
    assert share(train_songs(songs), 0, 1.0, 50) == 1
    assert share(train_songs(songs, genre_ratio=100), 0, 2.0, 50) == 1


@pytest.mark.parametrize("override, track, value", [("caption", 0, 1.0), ("genre", 0, 2.0), ("genre", 3, 1.0)])
def test_a_songs_own_choice_wins(songs, override, track, value):
    chosen = [replace(song, track=replace(song.track, prompt_override=override)) for song in songs]
    for ratio in (0, 50, 100):
        assert share(train_songs(chosen, genre_ratio=ratio), track, value, 20) == 1


def test_conditions_are_dropped_at_the_rate_asked_for(songs):
    for rate, low, high in ((0.0, 0, 0), (0.15, 0.1, 0.2), (1.0, 1, 1)):
        dataset = train_songs(songs, condition_dropout=rate)
        assert low <= sum(dataset[draw]["dropped"] for draw in draws(1, 400)) / 400 <= high


def test_hints_come_with_their_own_conditions(songs):
    dataset = train_songs(songs, lm_hints=0.4, genre_ratio=50)
    items = [dataset[draw] for draw in draws(0, 400)]
    hinted = [item for item in items if item["hints"] is not None]
    assert 0.32 < len(hinted) / len(items) < 0.48
    assert {float(item["condition"].mean()) for item in hinted} == {11.0, 12.0}
    assert {float(item["condition"].mean()) for item in items if item["hints"] is None} == {1.0, 2.0}


def test_songs_without_hints_are_trained_without(songs):
    bare = [replace(song, entry=replace(song.entry, names=song.entry.names - {"hints"})) for song in songs]
    assert all(train_songs(bare, lm_hints=1.0)[draw]["hints"] is None for draw in draws(0, 20))


@given(st.integers(1, 40), st.integers(0, 30), st.integers(0, 500))
@settings(max_examples=30, deadline=None)
def test_stratified_timesteps_take_each_share_once(songs, window, number, first):
    dataset = train_songs(songs, stratify=True)
    ts = [dataset[Draw(0, number, first + slot, slot, window)]["t"] for slot in range(window)]
    assert sorted(int(t * window) for t in ts) == list(range(window))


def test_stratified_timesteps_follow_the_law(songs):
    """No share of the window belongs to a slot: over many windows every slot sees the whole law."""
    dataset = train_songs(songs, stratify=True, timesteps=LogitNormal())
    ts = torch.tensor([dataset[Draw(0, number, 8, 0, 4)]["t"] for number in range(400)])
    expected = LogitNormal()((torch.arange(400) + 0.5) / 400)
    assert (ts.sort().values - expected).abs().max() < 0.08


# ---------------------------------------------------------------- batches


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 12), st.booleans()), min_size=1, max_size=4))
def test_padding_is_masked_and_nothing_else(sizes):
    items = []
    for i, (frames, tokens, hinted) in enumerate(sizes):
        latents, noise, condition = torch.rand(frames, 3) + 1, torch.rand(frames, 3) + 1, torch.rand(tokens, 4) + 1
        values = {"latents": latents, "noise": noise, "condition": condition, "hints": latents + 1 if hinted else None}
        settings = {"t": 0.1 * i, "weight": float(i), "dropped": i == 1, "level": i, "window": 7, "key": i + 5}
        items.append(values | settings | {"track": f"{i}"})
    batch = collate(items)
    frames, tokens, hinted = (torch.tensor(values) for values in zip(*sizes, strict=True))
    for i, item in enumerate(items):
        for name, length in (("latents", frames[i]), ("noise", frames[i]), ("condition", tokens[i])):
            row = getattr(batch, name)[i]
            assert torch.equal(row[:length], item[name]) and not row[length:].any()
        if hinted[i]:
            assert torch.equal(batch.hints[i, : frames[i]], item["hints"])
    for mask, lengths in ((batch.frame_mask, frames), (batch.condition_mask, tokens)):
        if lengths.min() == lengths.max():
            assert mask is None
        else:
            assert mask.dtype == torch.bool and torch.equal(mask.sum(1), lengths)
            assert (mask[:, :-1] | ~mask[:, 1:]).all()  # real ones first
    assert torch.equal(batch.frames, frames) and torch.equal(batch.hinted, hinted)
    assert (batch.hints is None) == (not hinted.any())
    assert batch.latents.shape == batch.noise.shape and (
        batch.hints is None or batch.hints.shape == batch.latents.shape
    )
    assert (batch.window, batch.key, batch.tracks) == (7, 5, [str(i) for i in range(len(sizes))])
    assert batch.weight.tolist() == list(range(len(sizes))) == batch.level.tolist()
    assert batch.padding == pytest.approx(1 - int(frames.sum()) / (len(sizes) * int(frames.max())))


def test_batches_move_whole(songs):
    dataset = train_songs(songs, lm_hints=1.0)
    batch = collate([dataset[Draw(i, 0, i, i, 2)] for i in (0, 1)])
    moved = batch.to("meta")
    for field in fields(Batch):
        before, after = getattr(batch, field.name), getattr(moved, field.name)
        assert after.is_meta if isinstance(before, Tensor) else before == after
    assert same(batch, batch.to("cpu"))


def loader(songs, num_workers: int, rank: int = 0, world: int = 1, batch_size: int = 2) -> ResumableLoader:
    dataset = train_songs(songs, crop_frames=16, stratify=True, lm_hints=0.5, genre_ratio=50, condition_dropout=0.3)
    order = EpochOrder(dataset, batch_size, 2, rank, world)
    return ResumableLoader(dataset, batch_sampler=order, collate_fn=collate, num_workers=num_workers)


def test_items_do_not_depend_on_workers(songs):
    repeated = [replace(song, track=replace(song.track, repeat=3)) for song in songs]
    alone, helped = (list(loader(repeated, num_workers)) for num_workers in (0, 2))
    assert len(alone) == 8
    assert all(same(one, two) for one, two in zip(alone, helped, strict=True))


def test_items_do_not_depend_on_ranks(songs):
    """One rank with batches of two, or two ranks with batches of one: the same items in the same steps."""
    repeated = [replace(song, track=replace(song.track, repeat=3)) for song in songs]

    def items(world: int, batch_size: int) -> dict:
        found = {}
        for rank in range(world):
            for batch in loader(repeated, 0, rank, world, batch_size):
                for i, track in enumerate(batch.tracks):
                    if batch.weight[i]:
                        noise = batch.noise[i, : batch.frames[i]]
                        found[track, float(noise.sum())] = (float(batch.t[i]), bool(batch.dropped[i]), batch.window)
        return found

    assert len(items(1, 2)) == 15
    assert items(1, 2) == items(2, 1)


@pytest.mark.parametrize("taken", [0, 1, 5, 7])
def test_an_epoch_is_continued_where_it_stopped(songs, taken):
    repeated = [replace(song, track=replace(song.track, repeat=3)) for song in songs]
    whole, first, second, third = (loader(repeated, 0) for _ in range(4))
    batches, iterator = list(whole), iter(first)
    for _ in range(taken):
        next(iterator)
    second.load_state_dict(first.state_dict())
    assert same(next(iter(second)), batches[taken])
    third.load_state_dict(second.state_dict())  # stopped a second time, a batch later
    rest = list(third)
    expected = batches[taken + 1 :] or batches
    assert all(same(one, two) for one, two in zip(rest, expected, strict=True))
    assert len(list(third)) == len(batches)  # the next epoch is a whole one


def test_a_finished_epoch_is_not_continued(songs):
    first, second = loader(songs, 0), loader(songs, 0)
    batches = list(first)
    second.load_state_dict(first.state_dict())
    assert len(list(second)) == len(batches)


# ---------------------------------------------------------------- memory or disk


def test_items_do_not_depend_on_where_they_are_read_from(songs):
    held = [replace(song, entry=song.entry.in_memory()) for song in songs]
    options = {"crop_frames": 8, "lm_hints": 0.5, "genre_ratio": 50}
    for draw in [*draws(2, 20), *draws(0, 5)]:
        assert same(train_songs(songs, **options)[draw], train_songs(held, **options)[draw])


def test_spawned_workers_are_not_sent_the_cache(songs):
    held = songs[4].entry.in_memory()
    sent = pickle.loads(pickle.dumps(held))
    assert held.tensors and sent == songs[4].entry and sent.tensors is None
    assert torch.equal(sent.read("latents.mean"), held.tensors["latents.mean"])


@pytest.mark.parametrize("preload, share, held", [("auto", 0.25, True), ("auto", 0, False), (True, 0, True)])
def test_a_cache_that_fits_is_held_in_memory(make, folder, monkeypatch, preload, share, held):
    monkeypatch.setattr(datamodule, "PRELOAD_SHARE", share)
    data = ready(make(dir=str(folder), preload=preload))
    assert {song.entry.tensors is not None for song in data.train_set.songs} == {held}
    assert ready(make(dir=str(folder), preload=False)).songs[0].entry.tensors is None


def test_an_entry_that_goes_away_is_told(songs, tmp_path):
    path = shutil.copy(songs[2].entry.path, tmp_path)
    dataset = train_songs([replace(songs[2], entry=replace(songs[2].entry, path=Path(path)))])
    shutil.copy(songs[1].entry.path, path)
    with pytest.raises(CacheError, match="was replaced by another song's entry"):
        dataset[Draw(0, 0, 0, 0, 1)]
    for damage in (lambda: Path(path).write_bytes(b"damaged"), Path(path).unlink):
        damage()
        with pytest.raises(CacheError, match=r"is gone or damaged .*: start again"):
            dataset[Draw(0, 0, 0, 0, 1)]


# ---------------------------------------------------------------- windows with words of their own

LYRICS = "[Verse]\nfirst line\nsecond line\n[Chorus]\nthird line"


@pytest.fixture(scope="module")
def sung(tmp_path_factory) -> Path:
    """Six songs of four seconds, sung alike: lines at 0.2-0.8, 1.2-1.8 and 3.2-3.8 s. The last has no times."""
    folder = tmp_path_factory.mktemp("sung")
    rng = np.random.default_rng(0)
    lines = [{"start": i + 0.2, "end": i + 0.8, "text": text} for i, text in ((0, "first line"), (1, "second line"))]
    lines.append({"start": 3.2, "end": 3.8, "text": "third line"})
    for i in range(6):
        soundfile.write(folder / f"{i}.wav", rng.normal(0, 0.1, (64000, 2)), 16000)
        (folder / f"{i}.lyrics.txt").write_text(LYRICS, encoding="utf-8")
        (folder / f"{i}.caption.txt").write_text("humming", encoding="utf-8")
        if i < 5:
            (folder / f"{i}.lyrics.json").write_text(json.dumps({"language": "en", "lines": lines}), encoding="utf-8")
    return folder


def told(data: LatentDataModule, lyrics: str, seconds: float, track: Track) -> Tensor:
    """The condition of a song that is these lyrics and this long."""
    language = "unknown" if lyrics == INSTRUMENTAL else track.language
    module = TextPass.load(Encoder(data.base, data.cache, data.conditioning, data.audio, data.dtype), [])
    with torch.inference_mode():
        song = replace(track, lyrics=lyrics, language=language)
        return dict(module.conditions(Job(track), song, seconds))["condition.caption"]


def test_the_words_follow_the_crop(make, sung):
    """Crops of one second every half second: each has the condition of a song that is just that second."""
    data = ready(make(dir=str(sung), crop_seconds=1.0, crop_lyrics=True, val_fraction=0.4))
    texts = {  # first frame of 25 a second -> what is sung in the second from there
        0: "[Verse]\nfirst line",
        12: "[Verse]\nfirst line\nsecond line",
        24: "[Verse]\nsecond line",
        36: "[Verse]\nsecond line",
        48: INSTRUMENTAL,
        60: "[Chorus]\nthird line",
        72: "[Chorus]\nthird line",
        75: "[Chorus]\nthird line",
    }
    timed = next(i for i, song in enumerate(data.train_set.songs) if song.track.id != "5.wav")
    song, seen = data.train_set.songs[timed], set()
    expected = {start: told(data, text, 1.0, song.track) for start, text in texts.items()}
    mean = song.entry.read("latents.mean")
    for draw in draws(timed, 60):
        item = data.train_set[draw]
        start = next(start for start in texts if close_to(item["latents"], mean[start : start + 25], song))
        torch.testing.assert_close(item["condition"], expected[start], rtol=0, atol=1e-5)
        seen.add(start)
    assert seen == set(texts)
    assert sorted(name for name in song.entry.names if "@" in name) == [f"condition.caption@{i}" for i in range(5)]
    held_out = next(i for i, song in enumerate(data.val_set.songs) if song.track.id != "5.wav")
    condition = data.val_set[Draw(held_out, 0, 0, 2, 0)]["condition"]
    assert any(len(condition) == len(states) and torch.allclose(condition, states) for states in expected.values())


def close_to(latents: Tensor, mean: Tensor, song: Song) -> bool:
    return latents.shape == mean.shape and bool((latents - mean).abs().max() < 8 * song.entry.read("latents.std").max())


def test_without_times_the_duration_follows_the_crop(make, sung):
    data = ready(make(dir=str(sung), crop_seconds=1.0, crop_lyrics=True))
    song = next(song for song in data.songs if song.track.id == "5.wav")
    assert song.windows == [0] * 8
    expected = told(data, LYRICS, 1.0, song.track)
    torch.testing.assert_close(song.entry.read("condition.caption@0"), expected, rtol=0, atol=1e-5)


def test_other_windows_and_other_times_make_other_conditions_alone(make, sung, tmp_path):
    shutil.copytree(sung, tmp_path / "songs", ignore=shutil.ignore_patterns(".acestep"))

    def latents_and_made(**options) -> tuple[Tensor, int, Path]:
        data = ready(make(dir=str(tmp_path / "songs"), **options))
        return data.songs[0].entry.read("latents.mean"), data.made, data.songs[0].entry.path

    cut = {"crop_seconds": 1.0, "crop_lyrics": True}
    first, made, path = latents_and_made(**cut)
    assert made == 6 and latents_and_made(**cut)[1] == 0
    found = [latents_and_made(**cut | {"crop_seconds": 2.0}), latents_and_made(crop_seconds=1.0)]
    document = {"lines": [{"start": 2.2, "end": 2.8, "text": "first line"}]}
    (tmp_path / "songs/0.lyrics.json").write_text(json.dumps(document), encoding="utf-8")
    found.append(latents_and_made(**cut))
    assert [made for _, made, _ in found] == [6, 6, 1]
    assert len({path, *(each for *_, each in found)}) == 4
    assert all(torch.equal(latents, first) for latents, *_ in found)
    (tmp_path / "songs/0.lyrics.json").write_text("{broken", encoding="utf-8")
    data = ready(make(dir=str(tmp_path / "songs"), **cut))
    assert len(data.songs) == 6 and data.remarks["0.wav"][0].startswith("line times are not used: ")


# ---------------------------------------------------------------- the data module


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Six songs at nano's rate, one of them twice."""
    folder = tmp_path_factory.mktemp("songs")
    write_songs(folder, rate=12000, count=6, seconds=0.6)
    shutil.copy(folder / "song_1.wav", folder / "song_1 copy.wav")
    return folder


@pytest.fixture(scope="module")
def make(nano):
    """make(dir=folder, ...) -> LatentDataModule for nano."""
    return partial(LatentDataModule, base=nano, conditioning=Conditioning(), timesteps=Uniform())


def ready(data: LatentDataModule, trainer=ALONE) -> LatentDataModule:
    data.encode(accelerator="cpu", devices=1)
    data.setup("fit")
    data.trainer = trainer
    return data


def split_of(make, folder, audio: list[str], **options) -> tuple[list[str], list[str]]:
    data = make(dir=str(folder), **options)
    songs = [unread_song(i, 10, audio=key) for i, key in enumerate(audio)]
    train, val = data.split(songs)
    assert not {id(song) for song in train} & {id(song) for song in val}
    return [song.track.id for song in train], [song.track.id for song in val]


@pytest.mark.parametrize("count, held", [(1, 0), (4, 0), (5, 1), (14, 1), (16, 2), (40, 4), (100, 10)])
def test_a_tenth_is_held_out(make, folder, count, held):
    audio = [f"{i:03}" for i in range(count)]
    train, val = split_of(make, folder, audio)
    assert (len(train), len(val)) == (count - held, held)
    assert split_of(make, folder, audio) == (train, val)
    assert split_of(make, folder, audio, val_fraction=0.0) == ([str(i) for i in range(count)], [])


def test_the_split_follows_seed_and_songs(make, folder):
    """Another seed holds out others; a song more moves hardly any; the order of songs does not matter."""
    audio = [f"{i:03}" for i in range(100)]
    (_, val), (_, other) = split_of(make, folder, audio), split_of(make, folder, audio, seed=7)
    assert set(val) != set(other)
    assert len(set(val) & set(split_of(make, folder, [*audio, "new"])[1])) >= 9
    _, backwards = split_of(make, folder, audio[::-1])
    assert {99 - int(id) for id in backwards} == {int(id) for id in val}


def test_copies_of_a_song_stay_on_one_side(make, folder):
    for seed in range(20):
        train, val = split_of(make, folder, ["a", "a", "a", "b", "c", "b"], seed=seed)
        assert val in (["0", "1", "2"], ["3", "5"], ["4"])
    assert split_of(make, folder, ["a"] * 6) == ([str(i) for i in range(6)], [])


def test_a_folder_becomes_batches(make, folder):
    data = ready(make(dir=str(folder), batch_size=2, accumulate=2, crop_seconds=0.5))
    assert data.cache.folder == folder / ".acestep" and not data.bad
    assert [song.track.duration for song in data.songs[:2]] == [7201 / 12000, 9608 / 12000]
    held, trained = ({song.track.id for song in each.songs} for each in (data.val_set, data.train_set))
    assert len(held) + len(trained) == 7 and held and not held & trained
    batches = list(data.train_dataloader())
    assert sorted(track for batch in batches for track in batch.tracks) == sorted(trained)
    assert all(batch.latents.shape[1:] == (12, 48) for batch in batches)  # 0.5 s at 25 Hz
    again = make(dir=str(folder))
    assert again.encode(run=False) == 0


def test_few_songs_are_validated_on_themselves(make, folder, tmp_path, caplog):
    for i in range(2):
        shutil.copy(folder / f"song_{i}.wav", tmp_path)
    data = ready(make(dir=str(tmp_path), cache_dir=str(folder / ".acestep")))
    assert data.val_set.songs == data.train_set.songs
    assert "2 tracks are too few to hold one out" in caplog.text


def grid(data: LatentDataModule, batch_size: int, rank: int = 0, world: int = 1) -> dict:
    """Every validated item by song and timestep, what idle ranks repeat left out."""
    data.batch_size, data.trainer = batch_size, SimpleNamespace(global_rank=rank, world_size=world)
    found = {}
    for batch in data.val_dataloader():
        for i, track in enumerate(batch.tracks):
            if batch.weight[i]:
                frames = int(batch.frames[i])
                key = track, round(float(batch.t[i]), 3), int(batch.level[i])
                assert key not in found
                found[key] = torch.cat([batch.latents[i, :frames], batch.noise[i, :frames]])
    return found


def test_validation_is_a_fixed_grid(make, folder):
    data = ready(make(dir=str(folder), crop_seconds=0.5, condition_dropout=1.0, genre_ratio=100, val_fraction=0.4))
    first = grid(data, batch_size=1)
    held_out, seen = ([song.track.id for song in songs] for songs in (data.val_set.songs, data.seen))
    trained, levels = [song.track.id for song in data.train_set.songs], len(VAL_TIMESTEPS)
    assert len(seen) == len(held_out) == len(set(seen)) and set(seen) <= set(trained)
    assert first.keys() == {
        (id, t, level + levels * (id in seen)) for id in (*held_out, *seen) for level, t in enumerate(VAL_TIMESTEPS)
    }
    for other in (grid(data, 1), grid(data, 3), grid(data, 2, 0, 2) | grid(data, 2, 1, 2)):
        assert other.keys() == first.keys() and all(torch.equal(first[key], other[key]) for key in first)
    noises = [values[12:] for values in first.values()]
    assert not any(torch.equal(a, b) for i, a in enumerate(noises) for b in noises[:i])
    assert not any(batch.dropped.any() for batch in data.val_dataloader())


def test_validation_deals_ranks_equally_many_batches(make, folder):
    data = ready(make(dir=str(folder), val_fraction=0.1, batch_size=3))
    counts = []
    for rank in range(4):
        data.trainer = SimpleNamespace(global_rank=rank, world_size=4)
        counts.append(len(data.val_dataloader()))
    assert len(set(counts)) == 1


# ---------------------------------------------------------------- what goes wrong


def test_no_dataset(make):
    with pytest.raises(DatasetError, match=r"give dataset\.dir=FOLDER \(or dataset\.json=FILE\)"):
        make()


def test_no_songs(make, tmp_path):
    (tmp_path / "notes.txt").write_text("nothing", encoding="utf-8")
    with pytest.raises(DatasetError, match="No song was found in .*: give dataset.dir=FOLDER"):
        make(dir=str(tmp_path))
    (tmp_path / "zero.mp3").write_bytes(b"")
    with pytest.raises(DatasetError, match=r"No song was found in .*zero.mp3: is empty \(0 bytes\)"):
        make(dir=str(tmp_path))


def test_batches_of_nothing(make, folder):
    with pytest.raises(UserError, match="dataset.batch_size must be at least 1, got 0"):
        make(dir=str(folder), batch_size=0)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"normalize": "rms"}, "dataset.normalize=rms is unknown"),
        ({"preload": "maybe"}, "dataset.preload=maybe is none of auto, true, false"),
        ({"crop_lyrics": True}, "dataset.crop_lyrics needs audio and crops"),
    ],
)
def test_settings_are_refused_before_any_work(make, folder, options, message):
    with pytest.raises(UserError, match=message):
        make(dir=str(folder), **options)


BAD = ("text_renamed.wav", "head_only.mp3", "one_sample.wav", "header_only.wav", "short_0_1s.wav")


def test_bad_songs_alone(make, tmp_path):
    """One error with reasons, before the transformer is loaded."""
    for name in BAD:
        shutil.copy(HERE / "bad_audio" / name, tmp_path)
    data = make(dir=str(tmp_path))
    data.encode(accelerator="cpu", devices=1)
    assert {path.name for path, _ in data.bad} == set(BAD)
    with pytest.raises(UserError, match="No song is ready to train on .*head_only.mp3"):
        data.setup("fit")


def test_bad_songs_beside_good_ones(make, folder, tmp_path):
    for name in BAD:
        shutil.copy(HERE / "bad_audio" / name, tmp_path)
    for i in range(5):
        shutil.copy(folder / f"song_{i}.wav", tmp_path)
    (tmp_path / "song_0.json").write_text("{broken", encoding="utf-8")
    data = ready(make(dir=str(tmp_path)))
    assert {path.name for path, _ in data.bad} == set(BAD)
    assert all(reason and "\n" not in reason for _, reason in data.bad)
    assert [song.track.id for song in data.songs] == [f"song_{i}.wav" for i in range(5)]
    assert len(list(data.train_dataloader())) == 4
    before = sorted((tmp_path / ".acestep").glob("*.safetensors"))
    again = make(dir=str(tmp_path))
    assert again.encode(accelerator="cpu", devices=1) == 0  # known, and listed all the same
    assert again.bad == data.bad
    assert sorted((tmp_path / ".acestep").glob("*.safetensors")) == before
    shutil.copy(folder / "song_5.wav", tmp_path / BAD[0])  # mended
    mended = make(dir=str(tmp_path))
    assert mended.encode(accelerator="cpu", devices=1) == 1 and len(mended.bad) == len(BAD) - 1


def test_bad_songs_do_not_stop_several_devices(make, folder, tmp_path):
    shutil.copy(HERE / "bad_audio" / BAD[0], tmp_path)
    shutil.copy(folder / "song_0.wav", tmp_path)
    make(dir=str(tmp_path)).encode(accelerator="cpu", devices=1)
    data = make(dir=str(tmp_path))
    data.trainer = SimpleNamespace(global_rank=0, world_size=2)
    data.prepare_data()
    assert [song.track.id for song in data.songs] == ["song_0.wav"] and len(data.bad) == 1


def test_several_devices_want_songs_encoded_before(make, folder, tmp_path):
    """A multi-device predict inside prepare_data would hang."""
    data = make(dir=str(folder), cache_dir=str(tmp_path / "empty"))
    data.trainer = SimpleNamespace(global_rank=0, world_size=2)
    with pytest.raises(DatasetError, match="run python preprocess.py"):
        data.prepare_data()
    assert not (tmp_path / "empty").exists()


@pytest.mark.parametrize("of", ["dir", "list", "repeats", "json"])
def test_cache_beside_the_songs(make, folder, tmp_path, of):
    shutil.copy(folder / "song_0.wav", tmp_path)
    (tmp_path / "dataset.json").write_text('[{"audio_path": "song_0.wav", "caption": "lofi"}]', encoding="utf-8")
    dirs = {
        "dir": str(tmp_path),
        "list": [str(tmp_path), str(folder)],
        "repeats": [{"dir": str(tmp_path), "repeat": 2}],
    }
    source = {"json": str(tmp_path / "dataset.json")} if of == "json" else {"dir": dirs[of]}
    assert make(**source).cache.folder == tmp_path / ".acestep"


# ---------------------------------------------------------------- the official trainer's tensors


def test_upstream_tensors_are_trained_on(make, tmp_path):
    def save(name: str, frames: int, tokens: int, **changes):
        mask = torch.arange(769) < tokens
        latents, states = torch.randn(frames, 48).bfloat16(), torch.randn(769, 128).bfloat16()
        data = {"target_latents": latents, "encoder_hidden_states": states, "encoder_attention_mask": mask}
        torch.save(data | {"metadata": {"caption": "lofi"}} | changes, tmp_path / name)

    for i in range(5):
        save(f"{i}.pt", 20 + i, 40 + i)
    save("lokr.pt", 20, 40, metadata={"preprocess_mode": "lokr"})
    save("other model.pt", 20, 40, target_latents=torch.randn(20, 64))
    (tmp_path / "broken.pt").write_bytes(b"broken")
    data = ready(make(tensors=str(tmp_path)))
    assert [song.track.id for song in data.songs] == [f"{i}.pt" for i in range(5)]
    assert {path.name for path, _ in data.bad} == {"lokr.pt", "other model.pt", "broken.pt"}
    assert [song.track.duration for song in data.songs] == [(20 + i) / 25 for i in range(5)]
    shapes = {tuple(batch.latents.shape[1:]) + (batch.condition.shape[1],) for batch in data.train_dataloader()}
    assert shapes < {(20 + i, 48, 40 + i) for i in range(5)} and len(shapes) == 4
    entries = {path: path.stat().st_mtime_ns for path in (tmp_path / ".acestep").glob("*.safetensors")}
    ready(make(tensors=str(tmp_path)))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / ".acestep").glob("*.safetensors")} == entries


# ---------------------------------------------------------------- another base model


@pytest.mark.parametrize("conditioning", [Conditioning(), Conditioning(lm_hints=0.5)], ids=["plain", "hints"])
def test_another_base_model_all_the_way(configure, tmp_path, conditioning):
    """24 kHz, 20 frames a second, 8 channels, upstream's layout: nothing takes 48 kHz, 25 Hz or 64 for granted."""
    base = basemodel.find(str(base_model(tmp_path / "model")), variant=VARIANT, repo="none")
    base.check()
    write_songs(tmp_path / "songs", rate=24000, count=5, seconds=0.9)
    options = {"batch_size": 4, "crop_seconds": 1.5, "accumulate": 1, "condition_dropout": 0.2}
    data = ready(
        LatentDataModule(
            base=base, conditioning=conditioning, timesteps=LogitNormal(), dir=str(tmp_path / "songs"), **options
        )
    )
    durations = [song.track.duration for song in data.songs]
    assert durations == [(int((0.9 + 0.2 * i) * 24000) + 7 * i + 1) / 24000 for i in range(5)]
    assert [song.entry.frames for song in data.songs] == [int(duration * 20) for duration in durations]
    assert [song.entry.read("latents.mean").shape[1] for song in data.songs] == [8] * 5
    assert data.songs[0].entry.read("condition.caption").shape[1] == 64
    assert ("hints" in data.songs[0].entry.names) == bool(conditioning.lm_hints)
    (batch,) = data.train_dataloader()
    assert batch.latents.shape == (4, max(batch.frames), 8) and max(batch.frames) <= 30
    module = FlowModule(base, instantiate(configure("train", "adapter.r=4").adapter), optimizer=torch.optim.AdamW)
    module.load(torch.device("cpu"))
    losses = module.losses(batch)
    assert losses.shape == (4,) and losses.isfinite().all() and (losses > 0.1).all()
    losses.mean().backward()
    gradients = {name: parameter.grad for name, parameter in module.trainable().items()}
    assert all(gradient is not None for gradient in gradients.values())
    assert any(gradient.any() for gradient in gradients.values())
