"""Preprocessing: songs -> cache entries, as two predict passes of a Lightning Trainer.

The VAE pass, then the text pass; each loads its models, and they are gone before the next one's are loaded, so nobody
restarts anything to free memory. Decoding and resampling run in worker processes while the VAE encodes. Each song is
written as soon as it is done: an interrupted run continues where it stopped.
"""

import gc
import logging
import math
import re
import time
import weakref
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import lightning as L
import psutil
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from acestep_lora import basemodel
from acestep_lora.conditioning import Conditioning
from acestep_lora.data.audio import AudioError, Spool, spool
from acestep_lora.data.cache import Cache, Entry, audio_key, header_of, text_key
from acestep_lora.data.track import Track
from acestep_lora.hashes import FileHashes

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AudioSettings:
    """How songs are decoded, part of every audio key: seconds kept of each (None: all), and loudness normalisation."""

    max_duration: float | None = None
    normalize: str | None = None


@dataclass
class Job:
    """One track on its way into the cache."""

    track: Track
    audio_key: str = ""
    text_key: str = ""
    entry: Entry | None = None  # complete once `text_key` is set and matches its header
    problem: str = ""
    remarks: list[str] = field(default_factory=list)

    @property
    def ready(self) -> bool:
        return self.entry is not None and bool(self.text_key) and self.entry.header.get("text_key") == self.text_key


class Encoder:
    """Finds what the cache lacks for a base model and makes it.

    Args:
        dtype: of the frozen text and condition encoders and so of cached conditions; the VAE always runs in float32.
    """

    def __init__(
        self,
        base: basemodel.BaseModel,
        cache: Cache,
        conditioning: Conditioning,
        audio: AudioSettings,
        dtype: torch.dtype,
        timbre_token: bool | None = None,
    ) -> None:
        self.base, self.cache, self.conditioning, self.audio, self.dtype = base, cache, conditioning, audio, dtype
        self.timbre_token = base.uses_timbre_token() if timbre_token is None else timbre_token
        models = FileHashes()
        self.vae_hash, self.condition_hash = base.vae_hash(models), base.condition_hash(models)
        models.save()
        self.files = FileHashes(cache.folder / "files.json")

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
        self.complete(job, self.cache.lender(job.audio_key))
        return job

    def complete(self, job: Job, latents: Entry | None) -> None:
        """Give a job whatever entry the cache has for it: latents alone, or all of it."""
        job.entry = latents
        if latents is not None:
            texts = self.conditioning.key(job.track, latents.duration)
            job.text_key = text_key(texts, self.condition_hash, self.dtype, self.timbre_token)
            job.entry = self.cache.find(job.track, job.audio_key, job.text_key) or latents

    def run(self, jobs: list[Job], num_workers: int = 0, **trainer) -> None:
        """Make every missing entry. Failures are recorded in `job.problem` and never stop the others.

        `trainer`: accelerator, devices, num_nodes, strategy of the Lightning Trainer that runs the passes.
        """
        audio = [job for job in jobs if job.entry is None and not job.problem]
        if audio:
            self.cache.folder.mkdir(parents=True, exist_ok=True)
            self.files.save()
            songs = SpoolDataset(self, audio)
            stage("VAE", lambda: VAEPass.load(self, audio), lambda vae: self._predict(vae, songs, num_workers, trainer))
            self._share(jobs)
        text = [job for job in jobs if job.entry is not None and not job.ready and not job.problem]
        if text:
            names = "text and condition encoders"
            stage(
                names,
                lambda: TextPass.load(self, text),
                lambda encoders: self._predict(encoders, range(len(text)), 0, trainer),
            )
            self._share(jobs)
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

    def _predict(self, module: L.LightningModule, dataset, num_workers: int, trainer: dict) -> None:
        from acestep_lora.callbacks.progress import progress_bar

        loader = DataLoader(dataset, batch_size=None, num_workers=num_workers)
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


class SpoolDataset(Dataset):
    """Decodes song i into a spool file next to the cache, in whichever process the loader runs it."""

    def __init__(self, encoder: Encoder, jobs: list[Job]) -> None:
        self.paths = [job.track.path for job in jobs]
        self.rate, self.folder, self.settings = encoder.base.sample_rate, encoder.cache.folder, asdict(encoder.audio)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[int, Spool | str]:
        try:
            return i, spool(self.paths[i], self.rate, self.folder, **self.settings)
        except AudioError as error:
            return i, str(error)


class VAEPass(L.LightningModule):
    """Spooled audio -> posterior mean and std, one latents-only entry per song."""

    def __init__(self, encoder: Encoder, jobs: list[Job]) -> None:
        super().__init__()
        self.encoder, self.jobs = encoder, jobs

    @staticmethod
    def load(encoder: Encoder, jobs: list[Job]) -> "VAEPass":
        module = VAEPass(encoder, jobs)
        module.vae = basemodel.load_vae(encoder.base, torch.float32, "cpu")
        return module

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        return batch  # a spool is a file: its windows go to the device one by one

    def predict_step(self, item: tuple[int, Spool | str]) -> int:
        i, audio = item
        job, cache = self.jobs[i], self.encoder.cache
        if isinstance(audio, str):
            job.problem = audio
            return i
        with audio:
            job.remarks += audio.problems
            latents = cache.lender(job.audio_key)  # a copy of this song may have been encoded before it
            if latents is None:
                mean, std = encode_windows(self.vae, audio)
                header = header_of(job.track, audio.duration, len(mean), job.audio_key)
                path = cache.path(job.track, job.audio_key)
                latents = cache.write(path, {"latents.mean": mean, "latents.std": std}, header)
        self.encoder.complete(job, latents)
        return i


def receptive_frames(ratios: list[int]) -> int:
    """How many latent frames to either side can reach one frame of Oobleck's encoder, rounded up.

    Three residual units (kernel 7, dilations 1, 3, 9) and a strided convolution per ratio, kernels 7 and 3 at the ends.
    """
    radius, rate = 3, 1
    for ratio in ratios:
        radius += (39 + 2 * ratio) * rate
        rate *= ratio
    return math.ceil((radius + rate) / rate) + 1


def encode_windows(vae: nn.Module, audio: Spool, seconds: float = 10.0) -> tuple[Tensor, Tensor]:
    """Posterior mean and std [T, C] of a whole song, in windows whose overlap covers the encoder's receptive field.

    Equal to encoding the song in one piece (float32: to rounding), in memory that does not grow with its length.
    """
    ratios = vae.config.downsampling_ratios
    hop, margin = math.prod(ratios), receptive_frames(ratios)
    core = max(1, round(seconds * vae.config.sampling_rate / hop))
    total, means, stds = audio.frames // hop, [], []
    for start in range(0, max(total, 1), core):
        stop = start + core
        last = stop >= total
        first = max(0, start - margin)
        samples = audio.read(first * hop, audio.frames if last else min((stop + margin) * hop, audio.frames))
        window = torch.from_numpy(samples.T).unsqueeze(0).to(vae.device, vae.dtype)  # [1, 2, samples]
        posterior = vae.encode(window).latent_dist
        keep = slice(start - first, None if last else stop - first)
        means.append(posterior.mean[0, :, keep].T.float().cpu())
        stds.append(posterior.std[0, :, keep].T.float().cpu())
    return torch.cat(means), torch.cat(stds)


class TextPass(L.LightningModule):
    """Prompts and lyrics -> condition states, each song by itself; completes its entry."""

    def __init__(self, encoder: Encoder, jobs: list[Job]) -> None:
        super().__init__()
        self.encoder, self.jobs = encoder, jobs
        self.conditioning = encoder.conditioning

    @staticmethod
    def load(encoder: Encoder, jobs: list[Job]) -> "TextPass":
        module, base, dtype, device = TextPass(encoder, jobs), encoder.base, encoder.dtype, "cpu"
        module.text_encoder, module.tokenizer = basemodel.load_text_encoder(base, dtype, device)
        module.condition_encoder = basemodel.load_condition_encoder(base, dtype, device, encoder.timbre_token)
        if encoder.conditioning.lm_hints:
            module.audio_tokenizer, module.detokenizer = basemodel.load_audio_tokenizer(base, dtype, device)
        return module

    def predict_step(self, i: int) -> int:
        job = self.jobs[i]
        encoder, latents = self.encoder, job.entry
        tensors = {name: latents.read(name) for name in ("latents.mean", "latents.std")}
        for variant, (caption, instruction) in self.conditioning.variants(job.track).items():
            prompt, shortened = self._fit(job.track, caption, instruction, latents.duration)
            tensors[f"condition.{variant}"] = self._condition(prompt, self.conditioning.lyrics(job.track))
            if shortened:
                job.remarks.append(f"caption shortened to fit {self.conditioning.text_tokens} tokens")
        if self.conditioning.lm_hints:
            tensors["hints"] = self._hints(tensors["latents.mean"])
        header = header_of(job.track, latents.duration, latents.frames, job.audio_key, job.text_key)
        job.entry = encoder.cache.write(encoder.cache.path(job.track, job.audio_key, job.text_key), tensors, header)
        return i

    def _fit(self, track: Track, caption: str, instruction: str, duration: float) -> tuple[str, bool]:
        """The prompt, its caption cut short where tag and metas would not fit after it, and whether it was."""

        def prompt(length: int) -> str:
            return self.conditioning.prompt(track, caption[:length], instruction, duration)

        def tokens(length: int) -> int:
            return len(self.tokenizer(prompt(length)).input_ids)

        limit, length = self.conditioning.text_tokens, len(caption)
        if tokens(length) <= limit:
            return prompt(length), False
        length = max(0, bisect_right(range(length), limit, key=tokens) - 1)
        half_a_word = re.search(r" [!-~]+$", caption[:length])
        if half_a_word and not caption[length].isspace():
            length = half_a_word.start()
        return prompt(length), True

    def _tokens(self, text: str, limit: int) -> tuple[Tensor, Tensor]:
        """Token ids [1, l] and their mask."""
        padding = "max_length" if self.conditioning.padded else False
        out = self.tokenizer(text, truncation=True, max_length=limit, padding=padding, return_tensors="pt").to(
            self.device
        )
        return out.input_ids, out.attention_mask.bool()

    def _condition(self, prompt: str, lyrics: str) -> Tensor:
        """Condition states [L, D]: lyrics, timbre, text, in the order the condition encoder packs them."""
        text, text_mask = self._tokens(prompt, self.conditioning.text_tokens)
        lyric, lyric_mask = self._tokens(lyrics, self.conditioning.lyric_tokens)
        silence = self.condition_encoder.silence_latent
        timbre_frames = math.ceil(30 * self.encoder.base.frame_rate)
        timbre = silence[:, :timbre_frames] if self.conditioning.silence_timbre else torch.zeros_like(silence[:, :1])
        states, _ = self.condition_encoder(
            text_hidden_states=self.text_encoder(input_ids=text).last_hidden_state,
            text_attention_mask=text_mask,
            lyric_hidden_states=self.text_encoder.get_input_embeddings()(lyric),
            lyric_attention_mask=lyric_mask,
            refer_audio_acoustic_hidden_states_packed=timbre,
            refer_audio_order_mask=torch.zeros(1, dtype=torch.long, device=self.device),
        )
        return states[0].to(self.encoder.dtype).cpu()

    def _hints(self, latents: Tensor) -> Tensor:
        """Latents [T, C] through the 5 Hz tokenizer and back: what an LM's codes would give as context."""
        silence = self.condition_encoder.silence_latent
        codes, _ = self.audio_tokenizer.tokenize(latents[None].to(silence), silence)
        return self.detokenizer(codes)[0, : len(latents)].float().cpu()


def collect(jobs: list[Job]) -> tuple[list[Job], list[tuple[Path, str]]]:
    """The jobs that are ready, and (file, reason) of those that are not."""
    bad = [(job.track.path, job.problem or "was not encoded") for job in jobs if not job.ready]
    return [job for job in jobs if job.ready], bad
