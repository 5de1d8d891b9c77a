"""The two passes of preprocessing: audio -> latents, words -> condition states."""

import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from acestep_lora import basemodel
from acestep_lora.data.audio import AudioError, Spool, spool
from acestep_lora.data.cache import CacheError, cannot_write, header_of
from acestep_lora.data.oobleck import encode_windows, load_encoder
from acestep_lora.data.track import Track
from acestep_lora.errors import UserError

if TYPE_CHECKING:
    from acestep_lora.data.encode import Encoder, Job


class AheadLoader(DataLoader):
    """Decodes the next song of a SpoolDataset in a thread while this one is used."""

    def __iter__(self) -> Iterator[tuple[int, Spool | str | CacheError]]:
        songs, end = super().__iter__(), (-1, "")
        with ThreadPoolExecutor(1) as thread:
            ahead = thread.submit(next, songs, end)
            try:
                while (song := ahead.result()) != end:
                    ahead = thread.submit(next, songs, end)
                    yield song
            finally:
                if isinstance(unused := ahead.result()[1], Spool):  # stopped midway
                    unused.file.unlink(missing_ok=True)


class SpoolDataset(Dataset):
    """Decodes song i into a spool file next to the cache, in whichever process the loader runs it."""

    def __init__(self, encoder: "Encoder", jobs: list["Job"]) -> None:
        self.paths = [job.track.path for job in jobs]
        self.rate, self.folder, self.settings = encoder.base.sample_rate, encoder.cache.folder, asdict(encoder.audio)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[int, Spool | str | CacheError]:
        try:
            return i, spool(self.paths[i], self.rate, self.folder, **self.settings)
        except AudioError as error:
            return i, str(error)
        except OSError as error:  # no fault of the song's; raised from a worker it would be several lines
            return i, cannot_write(self.folder, error)


class VAEPass(L.LightningModule):
    """Spooled audio -> posterior mean and std, one latents-only entry per song."""

    def __init__(self, encoder: "Encoder", jobs: list["Job"]) -> None:
        super().__init__()
        self.encoder, self.jobs = encoder, jobs

    @staticmethod
    def load(encoder: "Encoder", jobs: list["Job"]) -> "VAEPass":
        module = VAEPass(encoder, jobs)
        module.vae = load_encoder(encoder.base, "cpu")
        return module

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        return batch  # a spool is a file: its windows go to the device one by one

    def predict_step(self, item: tuple[int, Spool | str | CacheError]) -> int:
        i, audio = item
        if isinstance(audio, CacheError):
            raise audio
        job, cache = self.jobs[i], self.encoder.cache
        if isinstance(audio, str):
            job.problem = audio
            return i
        with audio:
            job.remarks += audio.problems
            latents = cache.lender(job.audio_key)  # a copy of this song may have been encoded before it
            if latents is None:
                mean, std = encode_windows(self.vae, audio)
                if not (mean.isfinite().all() and std.isfinite().all()):
                    job.problem = "has latents that are not finite; remove it, or look at it in an audio editor"
                    return i
                header = header_of(job.track, audio.duration, len(mean), job.audio_key)
                path = cache.path(job.track, job.audio_key)
                latents = cache.write(path, {"latents.mean": mean, "latents.std": std}, header)
        self.encoder.complete(job, latents)
        return i


class TextPass(L.LightningModule):
    """Prompts and lyrics -> condition states, each song by itself; completes its entry."""

    def __init__(self, encoder: "Encoder", jobs: list["Job"]) -> None:
        super().__init__()
        self.encoder, self.jobs = encoder, jobs
        self.conditioning = encoder.conditioning

    @staticmethod
    def load(encoder: "Encoder", jobs: list["Job"]) -> "TextPass":
        module, base, dtype, device = TextPass(encoder, jobs), encoder.base, encoder.dtype, "cpu"
        module.text_encoder, module.tokenizer = basemodel.load_text_encoder(base, dtype, device)
        module.condition_encoder = basemodel.load_condition_encoder(base, dtype, device, encoder.timbre_token)
        if encoder.conditioning.lm_hints:
            module.audio_tokenizer, module.detokenizer = basemodel.load_audio_tokenizer(base, dtype, device)
        return module

    def predict_step(self, i: int) -> int:
        job, encoder = self.jobs[i], self.encoder
        latents = job.entry
        tensors = {name: latents.read(name) for name in ("latents.mean", "latents.std")}
        try:
            for number, passage in enumerate(job.passages):
                suffix = f"@{number}" if job.windows else ""
                tensors |= {f"{name}{suffix}": states for name, states in self.conditions(job, *passage)}
        except UserError as error:
            job.problem = str(error)
            return i
        if self.conditioning.lm_hints:
            tensors["hints"] = self._hints(tensors["latents.mean"])
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            job.problem = "has conditions that are not finite; is the base model whole?"
            return i
        header = header_of(job.track, latents.duration, latents.frames, job.audio_key, job.text_key)
        if job.windows:
            header["windows"] = json.dumps(job.windows)
        job.entry = encoder.cache.write(encoder.cache.path(job.track, job.audio_key, job.text_key), tensors, header)
        return i

    def conditions(self, job: "Job", track: Track, duration: float) -> Iterator[tuple[str, Tensor]]:
        """Name and states of every variant; what had to be left out is told in the job's remarks."""
        told = self.conditioning
        lyrics = told.fit_lyrics(track, self._count) if told.lyric_header else track.lyrics  # no end to keep
        if lyrics != track.lyrics:
            job.remark(f"lyrics shortened to fit {told.lyric_tokens} tokens")
        for variant, (caption, instruction) in told.variants(track).items():
            kept = told.fit_caption(track, caption, instruction, duration, self._count)
            if kept != caption:
                job.remark(f"caption shortened to fit {told.text_tokens} tokens")
            prompt = told.prompt(track, kept, instruction, duration)
            yield f"condition.{variant}", self._condition(prompt, told.lyrics(replace(track, lyrics=lyrics)))

    def _count(self, text: str) -> int:
        return len(self.tokenizer(text).input_ids)

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
