"""The LightningDataModule: songs found, encoded where the cache lacks them, split by track, batched."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import lightning as L
import psutil
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from acestep_lora import cli
from acestep_lora.basemodel import BaseModel
from acestep_lora.conditioning import Conditioning
from acestep_lora.data import fields, prior
from acestep_lora.data.cache import Cache, CacheError, read_upstream
from acestep_lora.data.draws import Draw, EpochOrder, cut
from acestep_lora.data.encode import AudioSettings, Encoder, Job, collect
from acestep_lora.data.items import VAL_TIMESTEPS, Batch, Song, TrainSongs, ValSongs, collate
from acestep_lora.data.track import Scan, Track, fault, read_dataset_json, scan, write_dataset_json
from acestep_lora.errors import UserError
from acestep_lora.filenames import own
from acestep_lora.hashes import FileHashes, digest
from acestep_lora.interrupts import ignore

log = logging.getLogger(__name__)


class DatasetError(UserError):
    """Nothing to train on, said before the transformer is loaded."""


class ResumableLoader(DataLoader):
    """A loader that continues inside an epoch: Lightning stores and restores how many batches were taken."""

    taken = 0

    def __iter__(self) -> Iterator[Batch]:
        self.taken = self.batch_sampler.start
        for batch in super().__iter__():
            self.taken += 1
            yield batch

    def state_dict(self) -> dict:
        return {"taken": self.taken, "of": len(self.batch_sampler), "cut": self.batch_sampler.cut}

    def load_state_dict(self, state: dict) -> None:
        if state["taken"] >= state["of"]:
            return  # the epoch is over
        if state["cut"] != self.batch_sampler.cut:
            was, now = (" x ".join(map(str, cut)) for cut in (state["cut"], self.batch_sampler.cut))
            raise DatasetError(
                f"The checkpoint is inside an epoch of {was} songs a step (batch_size, accumulate_grad_batches and "
                f"devices) and not {now}: resume with the same, or from a checkpoint at the end of an epoch."
            )
        self.batch_sampler.start = state["taken"]


def _missing(jobs: list[Job]) -> list[Job]:
    return [job for job in jobs if not job.ready and not job.problem]


def _reasons(bad: list[tuple[Path, str]]) -> str:
    """The first few files that cannot be used and why, in brackets; empty when there are none."""
    return f" ({'; '.join(f'{path.name}: {reason}' for path, reason in bad[:3])})" if bad else ""


PRELOAD_SHARE = 0.25
"""Of the memory that is free, what a cache may take to be held in it."""


class LatentDataModule(L.LightningDataModule):
    """Songs of one or more folders, encoded where the cache lacks them, split by track and batched.

    Args:
        dir: folder of songs, or a list of folders or {dir, repeat}; json: a dataset.json to read instead; tensors: a
            folder of the official trainer's .pt files to read instead.
        cache_dir: where entries live; None: `<dir>/.acestep`.
        crop_seconds: length of random crops; None trains on whole songs.
        crop_lyrics: take crops from fixed windows, each conditioned on its own duration and lines.
        preload: hold the cache in memory: True, False, or "auto" for when it takes little of what is free.
        val_fraction: share of tracks held out, from five tracks up; with fewer, validation runs on the training tracks.
        stratify: draw an optimizer step's timesteps from equal shares of the distribution.
        prior_prompts: other prompts, of which every item carries one (`FlowModule.drift`).
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
        crop_lyrics: bool = False,
        preload: bool | str = "auto",
        val_fraction: float = 0.1,
        condition_dropout: float = 0.0,
        stratify: bool = False,
        accumulate: int = 1,
        prior_prompts: Sequence[str] = (),
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise DatasetError(f"dataset.batch_size must be at least 1, got {batch_size}.")
        if not 0 <= val_fraction < 1:
            raise DatasetError(f"dataset.val_fraction must be in [0, 1), got {val_fraction}.")
        if preload not in (True, False, "auto"):
            raise DatasetError(f"dataset.preload={preload} is none of auto, true, false.")
        if crop_lyrics and (tensors or not crop_seconds):
            raise DatasetError("dataset.crop_lyrics needs audio and crops: set dataset.dir and dataset.crop_seconds.")
        self.base, self.conditioning, self.timesteps, self.seed, self.dtype = base, conditioning, timesteps, seed, dtype
        self.dir, self.json, self.tensors, self.timbre_token = dir, json, tensors, timbre_token
        self.tags = {"custom_tag": custom_tag, "tag_position": tag_position, "all_instrumental": all_instrumental}
        self.require_caption = require_caption
        self.audio = AudioSettings(max_duration, normalize)
        self.batch_size, self.num_workers, self.val_fraction = batch_size, num_workers, val_fraction
        self.crop_frames = round(crop_seconds * base.frame_rate) if crop_seconds else None
        self.crop_lyrics, self.preload, self.prior_prompts = crop_lyrics, preload, prior_prompts
        self.condition_dropout, self.stratify, self.accumulate = condition_dropout, stratify, accumulate
        self.cache = Cache(self._cache_folder(cache_dir))
        self.scan = self._scan()
        self.genre_ratio = self.scan.genre_ratio if genre_ratio is None else genre_ratio
        self.bad: list[tuple[Path, str]] = list(self.scan.problems)
        self.remarks: dict[str, list[str]] = {}  # track id -> what was noticed while encoding
        self.songs: list[Song] | None = None
        self.seen: list[Song] = []  # as many training songs as are held out, measured beside them
        self.made = 0  # songs that `encode` added to the cache
        self._reading = ExitStack()

    def _cache_folder(self, cache_dir: str | None) -> Path:
        source = self.json or self.tensors or self.dir
        if source is None:
            raise DatasetError("There is no dataset: give dataset.dir=FOLDER (or dataset.json=FILE).")
        if cache_dir:
            return Path(cache_dir).expanduser()
        if not isinstance(source, str):
            first = source[0]
            source = first if isinstance(first, str) else first["dir"]
        path = Path(source).expanduser()
        return own((path.parent if self.json else path) / ".acestep")

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
        self._prior()
        if self.trainer is not None and self.trainer.world_size > 1:
            if missing := self.encode(run=False):
                raise DatasetError(f"{missing} songs are not encoded yet: run {cli.preprocess_command()} first.")
            return
        self.encode(accelerator=self.trainer.accelerator if self.trainer else "auto", devices=1)

    def encode(self, run: bool = True, **trainer) -> int:
        """Make missing entries -> number of songs that were missing. Fills `songs` and `bad`."""
        if self.tensors:
            self.songs = self._import()
            return 0
        encoder = self._encoder()
        jobs = encoder.jobs(self.scan.tracks)
        missing = _missing(jobs)
        if run and missing:
            with self.cache.writing():
                jobs = encoder.jobs(self.scan.tracks)  # another process may have made them meanwhile
                missing = _missing(jobs)
                log.info("%d of %d songs are not in the cache yet", len(missing), len(jobs))
                encoder.run(jobs, num_workers=self.num_workers, **trainer)
        self._take(jobs)
        self.made = sum(job.ready for job in missing)
        return len(missing)

    def _encoder(self) -> Encoder:
        crop = self.crop_frames if self.crop_lyrics else None
        return Encoder(self.base, self.cache, self.conditioning, self.audio, self.dtype, self.timbre_token, crop)

    def _prior(self) -> list[Tensor]:
        return prior.encode(self._encoder(), self.prior_prompts) if self.prior_prompts else []

    def _take(self, jobs: list[Job]) -> None:
        ready, bad = collect(jobs)
        self.bad = [*self.scan.problems, *bad]
        self.remarks = {job.track.id: job.remarks for job in jobs if job.remarks}
        self.songs = [Song(replace(job.track, duration=job.entry.duration), job.entry) for job in ready]

    def _import(self) -> list[Song]:
        """Upstream's .pt tensors, converted into entries."""
        songs, hashes, root = [], FileHashes(self.cache.folder / "files.json"), Path(self.tensors).expanduser()
        for path in sorted(root.rglob("*.pt")):
            try:
                if reason := fault(path):
                    raise CacheError(reason)
                tensors, metadata = read_upstream(path, self.base.channels)
                caption = fields.caption(metadata.get("caption")) or ""
            except ValueError as error:
                self.bad.append((path, str(error)))
                continue
            key = digest("upstream", hashes.file(path))
            frames = len(tensors["latents.mean"])
            duration = frames / self.base.frame_rate
            name = path.relative_to(root).as_posix()
            track = Track(id=name, path=path, caption=caption, duration=duration)
            entry = self.cache.find(track, key, key) or self.cache.write(
                self.cache.path(track, key, key),
                tensors,
                {"audio_key": key, "text_key": key, "duration": repr(duration), "frames": str(frames)},
            )
            songs.append(Song(track, entry))
        hashes.save()
        return songs

    def write_json(self, path: Path, name: str = "untitled_dataset") -> None:
        """The songs that are ready, as a dataset.json in upstream's schema."""
        write_dataset_json([song.track for song in self.songs], path, name=name, genre_ratio=self.genre_ratio)

    # ------------------------------------------------------------ using it

    def setup(self, stage: str) -> None:
        self._reading.enter_context(self.cache.reading())
        if self.songs is None:
            self.encode(run=False)
        if not self.songs:
            raise DatasetError(f"No song is ready to train on{_reasons(self.bad)}: give other audio files.")
        self._preload()
        train, val = self.split(self.songs)
        others = self._prior()
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
            others,
        )
        self.val_set = ValSongs(val or train, self.seed, self.crop_frames, others)
        by_lot = sorted(train, key=lambda song: digest(self.seed, "seen", song.track.id))
        self.seen = by_lot[: len(val)]
        if self.trainer and self.batch_size > 1:
            log.info("%.1f %% of the frames in batches are padding", 100 * self._order().padding())

    def teardown(self, stage: str) -> None:
        self._reading.close()

    def _preload(self) -> None:
        """Read every entry once, where memory is plenty; spawned worker processes read from disk all the same."""
        if self.preload == "auto":
            processes = self.trainer.world_size if self.trainer else 1
            size = sum(song.entry.path.stat().st_size for song in self.songs)
            if size * processes > PRELOAD_SHARE * psutil.virtual_memory().available:
                return
        if self.preload:
            self.songs = [replace(song, entry=song.entry.in_memory()) for song in self.songs]

    def _order(self) -> EpochOrder:
        rank, world = self.trainer.global_rank, self.trainer.world_size
        return EpochOrder(self.train_set, self.batch_size, self.accumulate, rank, world)

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
            "worker_init_fn": ignore,
            "pin_memory": torch.cuda.is_available(),
        }

    def train_dataloader(self) -> DataLoader:
        return ResumableLoader(self.train_set, batch_sampler=self._order(), **self._loader_options())

    def val_dataloader(self) -> DataLoader:
        rank, world = self.trainer.global_rank, self.trainer.world_size
        held_out, levels = len(self.val_set.songs), len(VAL_TIMESTEPS)
        grid = ValSongs([*self.val_set.songs, *self.seen], self.seed, self.crop_frames, self.val_set.prior)
        longest_last = sorted(range(len(grid.songs)), key=lambda i: (i >= held_out, grid.length(i)))
        draws = [Draw(i, 0, 0, level + levels * (i >= held_out), 0) for i in longest_last for level in range(levels)]
        batches = cut(draws, self.batch_size, world)[rank::world]
        return DataLoader(grid, batch_sampler=batches, **self._loader_options())
