"""Preprocessing: songs -> cache entries, as two predict passes of a Lightning Trainer.

The VAE pass, then the text pass; each loads its models, and they are gone before the next one's are loaded, so nobody
restarts anything to free memory. The next song is decoded and resampled while the VAE encodes this one. Each song is
written as soon as it is done: an interrupted run continues where it stopped.
"""

import contextlib
import gc
import json
import logging
import time
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path

import lightning as L
import psutil
import soundfile
import torch
from torch.utils.data import DataLoader

from acestep_lora import basemodel
from acestep_lora.conditioning import Conditioning
from acestep_lora.data import lines
from acestep_lora.data.audio import check_normalize
from acestep_lora.data.cache import Cache, Entry, audio_key, text_key
from acestep_lora.data.fields import INSTRUMENTAL
from acestep_lora.data.track import Track
from acestep_lora.hashes import FileHashes, digest, write_atomic
from acestep_lora.interrupts import ignore
from acestep_lora.untrusted import read_object

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AudioSettings:
    """How songs are decoded, part of every audio key: seconds kept of each (None: all), and loudness normalisation."""

    max_duration: float | None = None
    normalize: str | None = None

    def __post_init__(self) -> None:
        check_normalize(self.normalize)


Passage = tuple[Track, float]
"""A song as it is put into words, whole or a part with its own lyrics, and its duration in seconds."""


@dataclass
class Job:
    """One track on its way into the cache."""

    track: Track
    audio_key: str = ""
    text_key: str = ""
    entry: Entry | None = None  # complete once `text_key` is set and matches its header
    passages: list[Passage] = field(default_factory=list)
    windows: list[int] = field(default_factory=list)  # of a song in windows: the passage of each
    problem: str = ""
    remarks: list[str] = field(default_factory=list)

    def remark(self, text: str) -> None:
        if text not in self.remarks:
            self.remarks.append(text)

    @property
    def ready(self) -> bool:
        return self.entry is not None and bool(self.text_key) and self.entry.header.get("text_key") == self.text_key


class BadFiles:
    """What is wrong with songs that could not be decoded or put into words: they are not tried at every start.

    A changed file, other words, other settings and another decoder are another key.
    """

    def __init__(self, store: Path) -> None:
        self.store = store
        self.decoders = [soundfile.__libsndfile_version__, find_spec("av") is not None]
        try:
            self.known: dict[str, str] = read_object(store)
        except (OSError, ValueError):
            self.known = {}

    def problem(self, job: Job) -> str:
        return str(self.known.get(self._key(job), ""))

    def _key(self, job: Job) -> str:
        """Of its words once it has latents, of its file before."""
        return job.text_key or digest(job.audio_key, job.track.path.name, self.decoders)

    def remember(self, jobs: list[Job]) -> None:
        """Of jobs that were just tried."""
        found = {self._key(job): job.problem for job in jobs if job.problem}
        if not found.items() <= self.known.items():
            self.known |= found
            with contextlib.suppress(OSError):  # the next start only tries them again
                write_atomic(self.store, json.dumps(self.known, ensure_ascii=False).encode())


class Encoder:
    """Finds what the cache lacks for a base model and makes it.

    Args:
        dtype: of the frozen text and condition encoders and so of cached conditions; the VAE always runs in float32.
        crop: frames of a training crop, when each is to have its own conditions; None: those of the whole song.
    """

    def __init__(
        self,
        base: basemodel.BaseModel,
        cache: Cache,
        conditioning: Conditioning,
        audio: AudioSettings,
        dtype: torch.dtype,
        timbre_token: bool | None = None,
        crop: int | None = None,
    ) -> None:
        self.base, self.cache, self.conditioning, self.audio, self.dtype = base, cache, conditioning, audio, dtype
        self.timbre_token = base.uses_timbre_token() if timbre_token is None else timbre_token
        self.crop = crop
        models = FileHashes()
        self.vae_hash, self.condition_hash = base.vae_hash(models), base.condition_hash(models)
        models.save()
        self.files, self.bad = FileHashes(cache.folder / "files.json"), BadFiles(cache.folder / "bad.json")

    def jobs(self, tracks: list[Track]) -> list[Job]:
        """The state of every track: its keys, and its entry as far as the cache has it."""
        jobs = [self._job(track) for track in tracks]
        if self.cache.folder.is_dir():
            self.files.save()
        return jobs

    def _job(self, track: Track) -> Job:
        job = Job(track)
        try:
            job.audio_key = audio_key(self.files.file(track.path), self.vae_hash, asdict(self.audio))
        except OSError as error:
            job.problem = f"cannot be read ({error.strerror})"
            return job
        job.problem = self.bad.problem(job)
        self.complete(job, self.cache.lender(job.audio_key))
        if not job.ready:
            job.problem = job.problem or self.bad.problem(job)
        return job

    def complete(self, job: Job, latents: Entry | None) -> None:
        """Give a job whatever entry the cache has for it: latents alone, or all of it."""
        job.entry = latents
        if latents is not None:
            job.passages, job.windows = self._passages(job, latents)
            texts = [self.conditioning.key(*passage) for passage in job.passages]
            texts = texts[0] if self.crop is None else [self.crop, job.windows, texts]
            job.text_key = text_key(texts, self.condition_hash, self.dtype, self.timbre_token)
            if not (job.ready and latents.path == self.cache.path(job.track, job.audio_key, job.text_key)):
                job.entry = self.cache.find(job.track, job.audio_key, job.text_key) or latents

    def _passages(self, job: Job, latents: Entry) -> tuple[list[Passage], list[int]]:
        """What is put into words: the song, or its different windows, and which of these each window is."""
        if self.crop is None:
            return [(job.track, latents.duration)], []
        rate = self.base.frame_rate
        starts, length = lines.starts(latents.frames, self.crop), min(latents.frames, self.crop)
        texts = [job.track.lyrics for _ in starts]
        try:
            sung = [] if job.track.is_instrumental else lines.read_lines(job.track.path)
            if song := lines.align(job.track.lyrics, sung, latents.duration):
                texts = [lines.excerpt(song, start / rate, (start + length) / rate) for start in starts]
        except (OSError, ValueError) as error:
            job.remark(f"line times are not used: {error}")
        different = list(dict.fromkeys(texts))
        tracks = [
            replace(job.track, lyrics=text, language="unknown" if text == INSTRUMENTAL else job.track.language)
            for text in different
        ]
        duration = latents.duration if length == latents.frames else length / rate
        return [(track, duration) for track in tracks], [different.index(text) for text in texts]

    def run(self, jobs: list[Job], num_workers: int = 0, **trainer) -> None:
        """Make every missing entry. Failures are recorded in `job.problem` and never stop the others.

        `trainer`: accelerator, devices, num_nodes, strategy of the Lightning Trainer that runs the passes.
        """
        from acestep_lora.data.passes import AheadLoader, SpoolDataset, TextPass, VAEPass  # and so diffusers

        audio = [job for job in jobs if job.entry is None and not job.problem]
        if audio:
            self.cache.create()
            self.files.save()
            songs = AheadLoader(
                SpoolDataset(self, audio), batch_size=None, num_workers=num_workers, worker_init_fn=ignore
            )
            stage("VAE", lambda: VAEPass.load(self, audio), lambda vae: self._predict(vae, songs, trainer))
            self._share(jobs)
            self.bad.remember(audio)
        text = [job for job in jobs if job.entry is not None and not job.ready and not job.problem]
        if text:
            names = "text and condition encoders"
            stage(
                names,
                lambda: TextPass.load(self, text),
                lambda encoders: self._predict(encoders, DataLoader(range(len(text)), batch_size=None), trainer),
            )
            self._share(jobs)
            self.bad.remember(text)
        for job in jobs:
            if job.ready:  # so the latents alone, which copies of a song may share, have served
                self.cache.path(job.track, job.audio_key).unlink(missing_ok=True)

    def _share(self, jobs: list[Job]) -> None:
        """Take over what the other processes of this pass did: entries are found in the cache, problems are sent."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            told = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(told, [(job.problem, job.remarks) for job in jobs])
            for job, *known in zip(jobs, *told, strict=True):
                job.problem = max(problem for problem, _ in known)
                job.remarks = list(dict.fromkeys(remark for _, remarks in known for remark in remarks))
        self.cache.forget()
        for job in jobs:
            if not job.ready and not job.problem:
                self.complete(job, self.cache.lender(job.audio_key))

    def _predict(self, module: L.LightningModule, loader: DataLoader, trainer: dict) -> None:
        from acestep_lora.callbacks.progress import progress_bar

        runner = L.Trainer(
            **trainer,
            precision="32-true",
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            callbacks=[progress_bar()],
        )
        runner.predict(module, loader, return_predictions=False)


def stage(name: str, load: Callable[[], L.LightningModule], use: Callable[[L.LightningModule], None]) -> None:
    """Load models, use them, and make sure they are gone: the models of two stages are never resident together."""
    started, cuda = time.monotonic(), torch.cuda.is_available()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    module = load()
    alive, size = weakref.ref(module), sum(p.numel() * p.element_size() for p in module.parameters())
    use(module)
    peak = torch.cuda.max_memory_allocated() if cuda else psutil.Process().memory_info().rss
    module.cpu()
    del module
    gc.collect()
    if alive() is not None:
        raise RuntimeError(f"The models of the stage '{name}' are still in memory after it: something refers to them.")
    where = "CUDA peak" if cuda else "process memory"
    log.info(
        "%s: %.1f MB of weights, %s %.0f MB, %.1f s",
        name,
        size / 2**20,
        where,
        peak / 2**20,
        time.monotonic() - started,
    )


def collect(jobs: list[Job]) -> tuple[list[Job], list[tuple[Path, str]]]:
    """The jobs that are ready, and (file, reason) of those that are not."""
    bad = [(job.track.path, job.problem or "was not encoded") for job in jobs if not job.ready]
    return [job for job in jobs if job.ready], bad
