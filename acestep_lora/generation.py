"""Prompt -> audio, through diffusers' AceStepPipeline whatever layout the base model has."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import soundfile
import torch
from diffusers import AceStepPipeline, AceStepTransformer1DModel, FlowMatchEulerDiscreteScheduler
from diffusers.utils.torch_utils import randn_tensor
from omegaconf import DictConfig
from torch import Tensor, nn

from acestep_lora import basemodel
from acestep_lora.adapter_files import apply_adapter, read
from acestep_lora.data.fields import INSTRUMENTAL
from acestep_lora.data.track import Track
from acestep_lora.dit import AceStepDiT
from acestep_lora.errors import UserError
from acestep_lora.hashes import replacing


@dataclass(frozen=True)
class Request:
    """What to generate. duration in seconds; guidance_scale 1 is none; no lyrics or instrumental: [Instrumental]."""

    prompt: str
    lyrics: str = ""
    duration: float = 30.0
    bpm: int | None = None
    keyscale: str = ""
    timesignature: str = ""
    language: str = "unknown"
    instrumental: bool = False
    negative_prompt: str = ""
    steps: int = 8
    shift: float = 3.0
    guidance_scale: float = 1.0
    seeds: list[int] = field(default_factory=lambda: [1])

    def __post_init__(self) -> None:
        if self.duration <= 0 or self.steps < 1:
            raise UserError(f"duration={self.duration} and steps={self.steps} must both be above 0.")

    @classmethod
    def like(cls, track: Track, model: DictConfig, duration: float, seeds: list[int]) -> "Request":
        """A song's own words, for at most `duration` seconds, by the sampling settings of a `model` config."""
        return cls(
            prompt=track.prompt(track.caption),
            lyrics=track.lyrics,
            duration=min(duration, track.duration),
            bpm=track.bpm,
            keyscale=track.keyscale,
            timesignature=track.timesignature,
            language=track.language,
            steps=model.steps,
            shift=model.shift,
            guidance_scale=model.guidance_scale,
            seeds=seeds,
        )

    @property
    def words(self) -> dict:
        """What the text encoder is told, by the pipeline's names."""
        return {
            "prompt": self.prompt,
            "lyrics": INSTRUMENTAL if self.instrumental or not self.lyrics else self.lyrics,
            "vocal_language": "unknown" if self.instrumental else self.language,
            "bpm": self.bpm,
            "keyscale": self.keyscale or None,
            "timesignature": self.timesignature or None,
        }


class Sampled(nn.Module):
    """A transformer in training, as a pipeline calls one: by upstream's names, under the training's `autocast`."""

    def __init__(self, dit: AceStepDiT, autocast: Callable[[], AbstractContextManager] = nullcontext) -> None:
        super().__init__()
        self.dit, self.autocast, self.config = dit, autocast, dit.config

    @property
    def dtype(self) -> torch.dtype:
        return self.dit.proj_in_conv.weight.dtype  # of the frozen weights; the adapter's are float32

    @property
    def device(self) -> torch.device:
        return self.dit.proj_in_conv.weight.device

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, context_latents: Tensor, **_
    ) -> tuple[Tensor]:
        with self.autocast():
            v = self.dit(hidden_states, timestep, encoder_hidden_states, context_latents)
        return (v.to(hidden_states.dtype),)


def load_pipeline(
    base: basemodel.BaseModel, dtype: torch.dtype, device: str | torch.device, timbre_token: bool | None = None
) -> AceStepPipeline:
    """The whole model as a pipeline: diffusers' own classes, read by the same code that training reads with."""
    transformer = basemodel.build(AceStepTransformer1DModel, base.dit, "decoder", dtype, device)
    return pipeline_around(transformer, base, dtype, device, timbre_token)


def pipeline_around(
    transformer: nn.Module | None,
    base: basemodel.BaseModel,
    dtype: torch.dtype,
    device: str | torch.device,
    timbre_token: bool | None = None,
) -> AceStepPipeline:
    """The other parts of the model, read, and a transformer that is there already."""
    text_encoder, tokenizer = basemodel.load_text_encoder(base, dtype, device)
    pipeline = AceStepPipeline(
        vae=basemodel.load_vae(base, dtype, device),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
        condition_encoder=basemodel.load_condition_encoder(base, dtype, device, timbre_token),
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0),
    )
    pipeline.set_progress_bar_config(desc="generating", leave=False)
    return pipeline


def add_adapters(pipeline, paths: list[str], scales: list[float]) -> None:
    """Load adapters onto the pipeline's transformer, all active at once, each at its own strength."""
    names = [f"adapter_{i}" for i in range(len(paths))]
    for name, path, scale in zip(names, paths, scales, strict=True):
        apply_adapter(pipeline.transformer, path, name=name, scale=scale)


@torch.no_grad()
def condition(pipeline, duration: float, words: dict) -> Tensor:
    """States [1, l, d] of a request's `words`, for so many seconds."""
    texts = pipeline.encode_prompt(device=pipeline.device, audio_duration=duration, **words)
    names = ("text_hidden_states", "text_attention_mask", "lyric_hidden_states", "lyric_attention_mask")
    silence = pipeline.condition_encoder.silence_latent[:, : math.ceil(30 * pipeline.latents_per_second)]
    states, _ = pipeline.condition_encoder(
        **dict(zip(names, texts, strict=True)),
        refer_audio_acoustic_hidden_states_packed=silence.to(texts[0].dtype),
        refer_audio_order_mask=torch.zeros(1, dtype=torch.long, device=pipeline.device),
    )
    return states


class Remembered(nn.Module):
    """In a condition encoder's place, what it said of some requests; `current` is the one that is generated."""

    def __init__(self, encoder: nn.Module, states: Sequence[Tensor]) -> None:
        super().__init__()
        self.register_buffer("silence_latent", encoder.silence_latent.detach().clone())
        self.register_buffer("null_condition_emb", encoder.null_condition_emb.detach().clone())
        self.states, self.current = list(states), 0

    @property
    def device(self) -> torch.device:
        return self.silence_latent.device

    def forward(self, **_) -> tuple[Tensor, None]:
        return self.states[self.current].to(self.device), None


class Remembering(AceStepPipeline):
    """A pipeline whose condition encoder is `Remembered`, without a text encoder; its VAE may be on another device."""

    @property
    def device(self) -> torch.device:
        return self.transformer.device

    def encode_prompt(self, *_, **__) -> tuple[None, None, None, None]:
        return None, None, None, None


def remember(
    base: basemodel.BaseModel, requests: Sequence[Request], dtype: torch.dtype, device, timbre_token: bool | None
) -> Callable[[nn.Module], Remembering]:
    """Encode the words of requests and let the encoders go -> a function that makes a pipeline of a transformer.

    Its VAE stays on the CPU.
    """
    pipeline = pipeline_around(None, base, dtype, device, timbre_token)
    states = [condition(pipeline, request.duration, request.words).cpu() for request in requests]
    vae, scheduler = pipeline.vae.cpu(), pipeline.scheduler
    remembered = Remembered(pipeline.condition_encoder, states).cpu()

    def make(transformer: nn.Module) -> Remembering:
        parts = {"text_encoder": None, "tokenizer": None, "scheduler": scheduler}
        made = Remembering(vae=vae, transformer=transformer, condition_encoder=remembered, **parts)
        made.set_progress_bar_config(disable=True)
        return made

    return make


@contextmanager
def negative(pipeline, request: Request) -> Iterator[None]:
    """Inside the block, guidance leads away from the negative prompt, as an instrumental of the same duration without
    metas, instead of the model's null condition.

    Only the caption is negative, so lyrics and metas are strengthened as against the null condition. The pipeline runs
    both conditions as one batch, which needs equal lengths, and the transformer has no mask for padding; so the batch
    is taken apart and each half runs with its own condition. Raises UserError where there is no guidance.
    """
    if not request.negative_prompt:
        yield
        return
    if pipeline.is_turbo or request.guidance_scale <= 1:
        reason = "turbo models run without guidance" if pipeline.is_turbo else "guidance_scale=1 is no guidance"
        raise UserError(f"negative_prompt={request.negative_prompt!r} has no effect, as {reason}: leave it out.")
    unwanted = {"prompt": request.negative_prompt, "lyrics": INSTRUMENTAL, "vocal_language": "unknown"}
    transformer, unwanted = pipeline.transformer, condition(pipeline, request.duration, unwanted)
    plain = transformer.forward

    def apart(*, encoder_hidden_states: Tensor, **inputs) -> tuple[Tensor]:
        halves = []
        for i, states in enumerate((encoder_hidden_states[:1], unwanted)):
            own = {name: value[i : i + 1] if isinstance(value, Tensor) else value for name, value in inputs.items()}
            halves += plain(encoder_hidden_states=states, **own)
        return (torch.cat(halves),)

    transformer.forward = apart
    try:
        yield
    finally:
        del transformer.forward


def generate(pipeline, request: Request, output: str = "pt") -> list[Tensor]:
    """Audio [2, samples] in [-1, 1] at the pipeline's rate, one per seed; noise is drawn on the CPU.

    With output="latent" it stays latents [t, c], for `decode`.
    """
    # The noise is drawn here: the pipeline's own is a frame too long for some fractional durations (28 frames at 25 Hz)
    frames = math.ceil(request.duration * pipeline.latents_per_second)
    shape = (1, frames, pipeline.transformer.config.audio_acoustic_hidden_dim)
    clips = []
    with negative(pipeline, request):
        for seed in request.seeds:
            generator = torch.Generator("cpu").manual_seed(seed)
            clips += pipeline(
                **request.words,
                audio_duration=request.duration,
                num_inference_steps=request.steps,
                guidance_scale=request.guidance_scale,
                shift=request.shift,
                latents=randn_tensor(shape, generator, pipeline.device, pipeline.transformer.dtype),
                output_type=output,
            ).audios
    return [clip.float().cpu() for clip in clips]


@torch.no_grad()
def decode(pipeline, latents: Tensor) -> Tensor:
    """Latents [t, c] as audio [2, samples], as loud as the pipeline makes its clips: with a peak of -1 dB."""
    audio = pipeline.vae.decode(latents.T[None].to(pipeline.vae.device, pipeline.vae.dtype)).sample[0].float().cpu()
    return audio * (10 ** (-1 / 20) / audio.abs().max().clamp(min=1e-6))


def trigger_tags(paths: list[str]) -> list[str]:
    """Trigger tags that the adapters' metadata name."""
    tags = [read(path).metadata.get("trigger_tag", "") for path in paths]
    return [tag for tag in tags if tag]


def write_audio(path: Path, audio: Tensor, rate: int) -> Path:
    """A .wav or .flac file of 16 bits from audio [2, samples] in [-1, 1]."""
    with replacing(path) as temporary:
        samples = np.clip(audio.T.numpy(), -1, 1)
        soundfile.write(temporary, samples, rate, subtype="PCM_16", format=path.suffix.removeprefix("."))
    return path


def write_spectrograms(path: Path, clips: Sequence[dict[str, Tensor]], rate: int) -> Path:
    """Mel spectrograms of clips [2, samples] under their titles on one decibel scale, a row each, as a PNG."""
    import librosa
    from matplotlib.figure import Figure

    columns = max(len(row) for row in clips)
    figure = Figure(figsize=(6 * columns, min(3.5 * len(clips), 600)), layout="constrained")
    for places, row in zip(figure.subplots(len(clips), columns, squeeze=False), clips, strict=True):
        for axes, (title, audio) in zip(places, row.items(), strict=True):
            mel = librosa.feature.melspectrogram(
                y=audio.mean(0).numpy(), sr=rate, n_mels=96, n_fft=1024, hop_length=256
            )
            decibels = librosa.power_to_db(mel, ref=1.0, top_db=None)
            extent = (0, audio.shape[-1] / rate, 0, 96)
            axes.imshow(decibels, origin="lower", aspect="auto", extent=extent, vmin=-60, vmax=30, cmap="magma")
            axes.set(title=title, xlabel="seconds", ylabel="mel band")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=90, format="png")
    return path


def write(
    pipeline,
    request: Request,
    paths: list[str],
    scales: list[float],
    folder: Path,
    suffix: str = "wav",
    compare: bool = False,
) -> list[Path]:
    """A clip per seed; with `compare`, also the same seeds without the adapters. One PNG shows all their spectrograms,
    a row for each seed."""
    before = generate(pipeline, request) if compare and paths else []
    add_adapters(pipeline, paths, scales)
    rate, written, pictures = pipeline.sample_rate, [], []
    for i, (seed, clip) in enumerate(zip(request.seeds, generate(pipeline, request), strict=True)):
        pictures.append({f"seed {seed}": clip})
        written.append(write_audio(folder / f"seed_{seed}.{suffix}", clip, rate))
        if before:
            pictures[-1] = {f"seed {seed}, base model": before[i], f"seed {seed}, with adapter": clip}
            written.append(write_audio(folder / f"seed_{seed}_base.{suffix}", before[i], rate))
    first, last = request.seeds[0], request.seeds[-1]
    name = f"seed_{first}.png" if first == last else f"seeds_{first}-{last}.png"
    return [*written, write_spectrograms(folder / name, pictures, rate)]
