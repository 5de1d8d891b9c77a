"""Cached latents -> batches. Everything random about an item is drawn here, so a training step is a pure function.

Random draws are keyed by (seed, epoch, the item's position in the epoch's global order, track id): they do not depend
on rank, worker, or how the epoch is cut into batches, which makes resuming exact.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from acestep_lora.basemodel import BaseModel
from acestep_lora.conditioning import Conditioning
from acestep_lora.data.cache import Cache, CacheError, Entry, read_upstream
from acestep_lora.data.encode import AudioSettings, Encoder, Job, collect
from acestep_lora.data.track import Scan, Track, read_dataset_json, scan, write_dataset_json
from acestep_lora.errors import UserError
from acestep_lora.hashes import FileHashes, digest
from acestep_lora.randomness import generator, key

log = logging.getLogger(__name__)

VAL_TIMESTEPS = (0.1, 0.3, 0.5, 0.7, 0.9)


class DatasetError(UserError):
    """Nothing to train on, said before the transformer is loaded."""


@dataclass
class Batch:
    """Items ready for one step, padded on the right.

    latents, noise [b, t, c]; t [b]; condition [b, l, d]; frames, weight [b]; dropped [b] bool (trained without
    condition); hints [b, t, c] with hinted [b] bool, or None; condition_mask [b, l] and frame_mask [b, t] bool, None
    when nothing is padded. `window` counts the items of the optimizer step this batch belongs to, over all ranks;
    `key` seeds what the model itself draws (adapter dropout); `level` [b] indexes VAL_TIMESTEPS in validation;
    `tracks` names the items.
    """

    latents: Tensor
    noise: Tensor
    t: Tensor
    condition: Tensor
    frames: Tensor
    weight: Tensor
    dropped: Tensor
    hinted: Tensor
    level: Tensor
    hints: Tensor | None
    condition_mask: Tensor | None
    frame_mask: Tensor | None
    window: int
    key: int
    tracks: list[str]

    def to(self, device, non_blocking: bool = False) -> "Batch":
        moved = {
            field.name: value.to(device, non_blocking=non_blocking)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **moved)

    def pin_memory(self) -> "Batch":
        pinned = {f.name: v.pin_memory() for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}
        return replace(self, **pinned)

    @property
    def padding(self) -> float:
        """Share of the frames that are padding."""
        return 1 - float(self.frames.sum()) / self.latents.shape[:2].numel()


@dataclass(frozen=True)
class Draw:
    """One item of an epoch: which track, where in the epoch's global order, and its place in its optimizer window."""

    track: int
    epoch: int
    position: int
    slot: int
    window: int
    weight: float = 1.0


def pad(rows: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    """[n_i, d] each -> [b, n, d] and a mask [b, n] of the real rows, None when no row is padding."""
    lengths = torch.tensor([len(row) for row in rows])
    stacked = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return stacked, None if lengths.min() == lengths.max() else torch.arange(stacked.shape[1]) < lengths.unsqueeze(1)


def collate(items: list[dict]) -> Batch:
    latents, frame_mask = pad([item["latents"] for item in items])
    condition, condition_mask = pad([item["condition"] for item in items])
    hinted = torch.tensor([item["hints"] is not None for item in items])
    hints = None
    if hinted.any():
        hints = pad([item["latents"] * 0 if item["hints"] is None else item["hints"] for item in items])[0]
    first = items[0]
    return Batch(
        latents=latents,
        noise=pad([item["noise"] for item in items])[0],
        t=torch.tensor([item["t"] for item in items]),
        condition=condition,
        frames=torch.tensor([len(item["latents"]) for item in items]),
        weight=torch.tensor([item["weight"] for item in items]),
        dropped=torch.tensor([item["dropped"] for item in items]),
        hinted=hinted,
        level=torch.tensor([item["level"] for item in items]),
        hints=hints,
        condition_mask=condition_mask,
        frame_mask=frame_mask,
        window=first["window"],
        key=first["key"],
        tracks=[item["track"] for item in items],
    )


@dataclass
class Song:
    track: Track
    entry: Entry
    names: frozenset[str]


class Songs(Dataset):
    """What training and validation items have in common: reading a song's latents and condition."""

    def __init__(self, songs: list[Song], seed: int, crop_frames: int | None) -> None:
        self.songs, self.seed, self.crop_frames = songs, seed, crop_frames

    def length(self, i: int) -> int:
        frames = self.songs[i].entry.frames
        return min(frames, self.crop_frames) if self.crop_frames else frames

    def _item(self, i: int, names: tuple, variant: str, hinted: bool) -> dict:
        """Crop, posterior sample and noise of song i, from generators keyed by `names`."""
        song = self.songs[i]
        entry, length = song.entry, self.length(i)
        slack = entry.frames - length
        start = int(torch.randint(slack + 1, (1,), generator=generator(self.seed, "crop", *names))) if slack else 0
        mean, std = (entry.read(name, start, start + length) for name in ("latents.mean", "latents.std"))
        posterior = torch.randn(mean.shape, generator=generator(self.seed, "posterior", *names))
        suffix = "_hint" if hinted else ""
        return {
            "latents": mean + std * posterior,
            "noise": torch.randn(mean.shape, generator=generator(self.seed, "noise", *names)),
            "condition": entry.read(f"condition.{variant}{suffix}"),
            "hints": entry.read("hints", start, start + length) if hinted else None,
            "track": song.track.id,
        }


class TrainSongs(Songs):
    """Items of the training epochs, addressed by Draw."""

    def __init__(
        self,
        songs: list[Song],
        seed: int,
        crop_frames: int | None,
        timesteps: Callable[[Tensor], Tensor],
        stratify: bool,
        condition_dropout: float,
        genre_ratio: float,
        lm_hints: float,
    ) -> None:
        super().__init__(songs, seed, crop_frames)
        self.timesteps, self.stratify, self.condition_dropout = timesteps, stratify, condition_dropout
        self.genre_ratio, self.lm_hints = genre_ratio, lm_hints

    def __getitem__(self, draw: Draw) -> dict:
        song = self.songs[draw.track]
        names = (draw.epoch, draw.position, song.track.id)
        genre, dropped, hinted, u = torch.rand(4, generator=generator(self.seed, "choices", *names)).tolist()
        prompt = song.track.prompt_override or ("genre" if genre < self.genre_ratio / 100 else "caption")
        variant = prompt if f"condition.{prompt}" in song.names else "caption"
        hinted = hinted < self.lm_hints and "hints" in song.names
        if self.stratify:
            u = (self._stratum(draw) + u) / draw.window
        return self._item(draw.track, names, variant, hinted) | {
            "t": self.timesteps(torch.tensor([u])).item(),
            "dropped": dropped < self.condition_dropout,
            "weight": draw.weight,
            "level": 0,
            "window": draw.window,
            "key": key(self.seed, "model", draw.epoch, draw.position),
        }

    def _stratum(self, draw: Draw) -> int:
        """Each item of an optimizer window takes its timestep from another n-th of the distribution."""
        window = generator(self.seed, "strata", draw.epoch, draw.position - draw.slot)
        return int(torch.randperm(draw.window, generator=window)[draw.slot])


class ValSongs(Songs):
    """The fixed grid: every song at every validation timestep, always with the same crop, sample and noise."""

    def __getitem__(self, draw: Draw) -> dict:
        level = draw.slot
        names = ("val", level, self.songs[draw.track].track.id)
        return self._item(draw.track, names, "caption", hinted=False) | {
            "t": VAL_TIMESTEPS[level],
            "dropped": False,
            "weight": draw.weight,
            "level": level,
            "window": 0,
            "key": 0,
        }


def cut(draws: list[Draw], batch_size: int, world: int) -> list[list[Draw]]:
    """Batches of consecutive draws, as many for each rank: an idle rank repeats an item at weight zero."""
    batches = [draws[first : first + batch_size] for first in range(0, len(draws), batch_size)]
    return batches + [[replace(draws[0], weight=0.0)]] * (-len(batches) % world)


class EpochOrder(Sampler[list[Draw]]):
    """The batches of an epoch for one rank, a function of (seed, epoch) alone.

    The epoch is shuffled, loosely sorted by length so that neighbours are alike, cut into optimizer windows of
    batch_size * accumulate * world items, and the windows are shuffled; each window is then dealt out to ranks and
    micro-batches. A window's items do not depend on how it is dealt, so one rank or four train on the same steps.
    """

    def __init__(self, dataset: TrainSongs, batch_size: int, accumulate: int, rank: int = 0, world: int = 1) -> None:
        self.dataset, self.batch_size, self.accumulate = dataset, batch_size, accumulate
        self.rank, self.world, self.epoch, self.start = rank, world, 0, 0
        self.sampler = self  # Lightning calls batch_sampler.sampler.set_epoch

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def order(self) -> list[int]:
        """Song indices of the epoch in its global order, repeats included."""
        dataset, names = self.dataset, (self.dataset.seed, "order", self.epoch)
        indices = [i for i, song in enumerate(dataset.songs) for _ in range(song.track.repeat)]
        shuffled = torch.randperm(len(indices), generator=generator(*names)).tolist()
        jitter = (torch.rand(len(indices), generator=generator(*names, "jitter")) * 0.3 + 0.85).tolist()

        def alike(items: list[int]) -> list[int]:
            return sorted(items, key=lambda item: dataset.length(indices[item]) * jitter[item])

        size = self.batch_size * self.accumulate * self.world
        rest = len(indices) % size  # the partial window: any items, or the longest songs would always be in it
        body = alike(shuffled[rest:])
        windows = [body[first : first + size] for first in range(0, len(body), size)]
        turns = torch.randperm(len(windows), generator=generator(*names, "windows")).tolist()
        dealt = [*(windows[turn] for turn in turns), alike(shuffled[:rest])]
        return [indices[item] for window in dealt for item in window]

    def batches(self) -> list[list[Draw]]:
        """Every rank's batches of the epoch, this rank's being every world-th."""
        order, size, dealt = self.order(), self.batch_size * self.accumulate * self.world, []
        for first in range(0, len(order), size):
            window = order[first : first + size]
            draws = [Draw(i, self.epoch, first + slot, slot, len(window)) for slot, i in enumerate(window)]
            dealt += cut(draws, self.batch_size, self.world)
        return dealt

    def __iter__(self) -> Iterator[list[Draw]]:
        start, self.start = self.start, 0
        yield from self.batches()[self.rank :: self.world][start:]

    def __len__(self) -> int:
        total = sum(song.track.repeat for song in self.dataset.songs)
        size = self.batch_size * self.accumulate * self.world
        whole, rest = divmod(total, size)
        return whole * self.accumulate + -(-rest // (self.batch_size * self.world))


class ResumableLoader(DataLoader):
    """A loader that continues inside an epoch: Lightning stores and restores how many batches were taken."""

    taken = 0

    def __iter__(self) -> Iterator[Batch]:
        self.taken = self.batch_sampler.start
        for batch in super().__iter__():
            self.taken += 1
            yield batch

    def state_dict(self) -> dict:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict) -> None:
        taken = state["taken"]
        self.batch_sampler.start = taken if taken < len(self.batch_sampler) else 0


def _reasons(bad: list[tuple[Path, str]]) -> str:
    """The first few files that cannot be used and why, in brackets; empty when there are none."""
    return f" ({'; '.join(f'{path.name}: {reason}' for path, reason in bad[:3])})" if bad else ""


class LatentDataModule(L.LightningDataModule):
    """Songs of one or more folders, encoded where the cache lacks them, split by track and batched.

    Args:
        dir: folder of songs, or a list of folders or {dir, repeat}; json: a dataset.json to read instead; tensors: a
            folder of the official trainer's .pt files to read instead.
        cache_dir: where entries live; None: `<dir>/.acestep`.
        crop_seconds: length of random crops; None trains on whole songs.
        val_fraction: share of tracks held out, from five tracks up; with fewer, validation runs on the training tracks.
        stratify: draw an optimizer step's timesteps from equal shares of the distribution.
    """

    def __init__(
        self,
        *,
        base: BaseModel,
        conditioning: Conditioning,
        timesteps: Callable[[Tensor], Tensor] | None = None,
        seed: int = 42,
        dtype: torch.dtype = torch.float32,
        timbre_token: bool | None = None,
        dir=None,
        json: str | None = None,
        tensors: str | None = None,
        cache_dir: str | None = None,
        custom_tag: str = "",
        tag_position: str | None = None,
        genre_ratio: float | None = None,
        all_instrumental: bool = False,
        require_caption: bool = False,
        max_duration: float | None = None,
        normalize: str | None = None,
        batch_size: int = 1,
        num_workers: int = 0,
        crop_seconds: float | None = None,
        val_fraction: float = 0.1,
        condition_dropout: float = 0.0,
        stratify: bool = False,
        accumulate: int = 1,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"dataset.batch_size must be at least 1, got {batch_size}.")
        self.base, self.conditioning, self.timesteps, self.seed, self.dtype = base, conditioning, timesteps, seed, dtype
        self.dir, self.json, self.tensors, self.timbre_token = dir, json, tensors, timbre_token
        self.tags = {"custom_tag": custom_tag, "tag_position": tag_position, "all_instrumental": all_instrumental}
        self.require_caption = require_caption
        self.audio = AudioSettings(max_duration, normalize)
        self.batch_size, self.num_workers, self.val_fraction = batch_size, num_workers, val_fraction
        self.crop_frames = round(crop_seconds * base.frame_rate) if crop_seconds else None
        self.condition_dropout, self.stratify, self.accumulate = condition_dropout, stratify, accumulate
        self.cache = Cache(self._cache_folder(cache_dir))
        self.scan = self._scan()
        self.genre_ratio = self.scan.genre_ratio if genre_ratio is None else genre_ratio
        self.bad: list[tuple[Path, str]] = list(self.scan.problems)
        self.remarks: dict[str, list[str]] = {}  # track id -> what was noticed while encoding
        self.songs: list[Song] | None = None
        self.made = 0  # songs that `encode` added to the cache

    def _cache_folder(self, cache_dir: str | None) -> Path:
        if cache_dir:
            return Path(cache_dir).expanduser()
        source = self.json or self.tensors or self.dir
        if source is None:
            raise DatasetError("There is no dataset: give dataset.dir=FOLDER (or dataset.json=FILE).")
        if not isinstance(source, str):
            first = source[0]
            source = first if isinstance(first, str) else first["dir"]
        path = Path(source).expanduser()
        return (path.parent if self.json else path) / ".acestep"

    def _scan(self) -> Scan:
        if self.tensors:
            return Scan([], [])
        read = read_dataset_json if self.json else scan
        found = read(self.json or self.dir, require_caption=self.require_caption, **self.tags)
        if not found.tracks:
            where = f"{self.json or self.dir}{_reasons(found.problems)}"
            raise DatasetError(f"No song was found in {where}: give dataset.dir=FOLDER with audio files.")
        return found

    # ------------------------------------------------------------ making the cache

    def prepare_data(self) -> None:
        """Encode what the cache lacks, on one device (train.py); preprocess.py calls `encode` on as many as it has."""
        if self.trainer is not None and self.trainer.world_size > 1:
            if self.encode(run=False):
                raise DatasetError("Some songs are not encoded yet: run preprocess.py with the same overrides first.")
            return
        self.encode(accelerator=self.trainer.accelerator if self.trainer else "auto", devices=1)

    def encode(self, run: bool = True, **trainer) -> int:
        """Make missing entries -> number of songs that were missing. Fills `songs` and `bad`."""
        if self.tensors:
            self.songs = self._import()
            return 0
        encoder = Encoder(self.base, self.cache, self.conditioning, self.audio, self.dtype, self.timbre_token)
        jobs = encoder.jobs(self.scan.tracks)
        missing = [job for job in jobs if not job.ready and not job.problem]
        if run and missing:
            log.info("%d of %d songs are not in the cache yet", len(missing), len(jobs))
            encoder.run(jobs, num_workers=self.num_workers, **trainer)
        self._take(jobs)
        self.made = sum(job.ready for job in missing)
        return len(missing)

    def _take(self, jobs: list[Job]) -> None:
        ready, bad = collect(jobs)
        self.bad = [*self.scan.problems, *bad]
        self.remarks = {job.track.id: job.remarks for job in jobs if job.remarks}
        self.songs = []
        for job in ready:
            track = replace(job.track, duration=job.entry.duration)
            self.songs.append(Song(track, job.entry, frozenset(job.entry.names())))

    def _import(self) -> list[Song]:
        """Upstream's .pt tensors, converted into entries."""
        songs, hashes, root = [], FileHashes(self.cache.folder / "files.json"), Path(self.tensors).expanduser()
        for path in sorted(root.rglob("*.pt")):
            try:
                tensors, metadata = read_upstream(path, self.base.channels)
            except CacheError as error:
                self.bad.append((path, str(error)))
                continue
            key = digest("upstream", hashes.file(path))
            frames = len(tensors["latents.mean"])
            duration = frames / self.base.frame_rate
            name, caption = path.relative_to(root).as_posix(), str(metadata.get("caption", ""))
            track = Track(id=name, path=path, caption=caption, duration=duration)
            entry = self.cache.find(track, key, key) or self.cache.write(
                self.cache.path(track, key, key),
                tensors,
                {"audio_key": key, "text_key": key, "duration": repr(duration), "frames": str(frames)},
            )
            songs.append(Song(track, entry, frozenset(tensors)))
        hashes.save()
        return songs

    def write_json(self, path: Path, name: str = "untitled_dataset") -> None:
        """The songs that are ready, as a dataset.json in upstream's schema."""
        write_dataset_json([song.track for song in self.songs], path, name=name, genre_ratio=self.genre_ratio)

    # ------------------------------------------------------------ using it

    def setup(self, stage: str) -> None:
        if self.songs is None:
            self.encode(run=False)
        if not self.songs:
            raise DatasetError(f"No song is ready to train on{_reasons(self.bad)}: give other audio files.")
        train, val = self.split(self.songs)
        if not val:
            log.warning(
                "%d tracks are too few to hold one out: val/loss is measured on the training tracks.", len(train)
            )
        self.train_set = TrainSongs(
            train,
            self.seed,
            self.crop_frames,
            self.timesteps,
            self.stratify,
            self.condition_dropout,
            self.genre_ratio,
            self.conditioning.lm_hints,
        )
        self.val_set = ValSongs(val or train, self.seed, self.crop_frames)

    def split(self, songs: list[Song]) -> tuple[list[Song], list[Song]]:
        """(training, held out), by track; copies of the same audio stay together."""
        if len(songs) < 5 or not self.val_fraction:
            return songs, []
        audio = sorted({s.entry.header["audio_key"] for s in songs}, key=lambda key: digest(self.seed, "split", key))
        held = set(audio[: max(1, round(len(audio) * self.val_fraction))])
        if len(held) == len(audio):
            return songs, []
        return (
            [song for song in songs if song.entry.header["audio_key"] not in held],
            [song for song in songs if song.entry.header["audio_key"] in held],
        )

    def _loader_options(self) -> dict:
        return {
            "collate_fn": collate,
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": torch.cuda.is_available(),
        }

    def train_dataloader(self) -> DataLoader:
        trainer = self.trainer
        order = EpochOrder(self.train_set, self.batch_size, self.accumulate, trainer.global_rank, trainer.world_size)
        return ResumableLoader(self.train_set, batch_sampler=order, **self._loader_options())

    def val_dataloader(self) -> DataLoader:
        rank, world = self.trainer.global_rank, self.trainer.world_size
        longest_last = sorted(range(len(self.val_set.songs)), key=self.val_set.length)
        draws = [Draw(i, 0, 0, level, 0) for i in longest_last for level in range(len(VAL_TIMESTEPS))]
        batches = cut(draws, self.batch_size, world)[rank::world]
        return DataLoader(self.val_set, batch_sampler=batches, **self._loader_options())
