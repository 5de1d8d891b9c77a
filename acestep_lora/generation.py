"""Prompt -> audio, through diffusers' AceStepPipeline whatever layout the base model has."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import soundfile
import torch
from diffusers import AceStepPipeline, AceStepTransformer1DModel, FlowMatchEulerDiscreteScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from acestep_lora import basemodel
from acestep_lora.adapter_files import apply_adapter, read
from acestep_lora.data.fields import INSTRUMENTAL
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


def load_pipeline(base: basemodel.BaseModel, dtype: torch.dtype, device: str, timbre_token: bool | None = None):
    """The whole model as a pipeline: diffusers' own classes, read by the same code that training reads with."""
    text_encoder, tokenizer = basemodel.load_text_encoder(base, dtype, device)
    transformer = basemodel.build(AceStepTransformer1DModel, base.dit, "decoder", dtype, device)
    return AceStepPipeline(
        vae=basemodel.load_vae(base, dtype, device),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
        condition_encoder=basemodel.load_condition_encoder(base, dtype, device, timbre_token),
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0),
    )


def add_adapters(pipeline, paths: list[str], scales: list[float]) -> None:
    """Load adapters onto the pipeline's transformer, all active at once, each at its own strength."""
    names = [f"adapter_{i}" for i in range(len(paths))]
    for name, path, scale in zip(names, paths, scales, strict=True):
        apply_adapter(pipeline.transformer, path, name=name, scale=scale)


@torch.no_grad()
def negative_condition(pipeline, request: Request) -> Tensor:
    """States [1, l, d] of the negative prompt as an instrumental of the same duration, without metas."""
    texts = pipeline.encode_prompt(
        request.negative_prompt, INSTRUMENTAL, pipeline.device, "unknown", audio_duration=request.duration
    )
    names = ("text_hidden_states", "text_attention_mask", "lyric_hidden_states", "lyric_attention_mask")
    silence = pipeline.condition_encoder.silence_latent[:, : math.ceil(30 * pipeline.latents_per_second)]
    states, _ = pipeline.condition_encoder(
        **dict(zip(names, texts, strict=True)),
        refer_audio_acoustic_hidden_states_packed=silence.to(pipeline.transformer.dtype),
        refer_audio_order_mask=torch.zeros(1, dtype=torch.long, device=pipeline.device),
    )
    return states


@contextmanager
def negative(pipeline, request: Request) -> Iterator[None]:
    """Inside the block, guidance leads away from the negative prompt instead of the model's null condition.

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
    transformer, unwanted = pipeline.transformer, negative_condition(pipeline, request)
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


def generate(pipeline, request: Request) -> list[Tensor]:
    """Audio [2, samples] in [-1, 1] at the pipeline's rate, one per seed; noise is drawn on the CPU."""
    pipeline.set_progress_bar_config(desc="generating", leave=False)
    # The noise is drawn here: the pipeline's own is a frame too long for some fractional durations (28 frames at 25 Hz)
    frames = math.ceil(request.duration * pipeline.latents_per_second)
    shape = (1, frames, pipeline.transformer.config.audio_acoustic_hidden_dim)
    clips = []
    with negative(pipeline, request):
        for seed in request.seeds:
            generator = torch.Generator("cpu").manual_seed(seed)
            clips += pipeline(
                prompt=request.prompt,
                lyrics=INSTRUMENTAL if request.instrumental or not request.lyrics else request.lyrics,
                audio_duration=request.duration,
                vocal_language="unknown" if request.instrumental else request.language,
                num_inference_steps=request.steps,
                guidance_scale=request.guidance_scale,
                shift=request.shift,
                bpm=request.bpm,
                keyscale=request.keyscale or None,
                timesignature=request.timesignature or None,
                latents=randn_tensor(shape, generator, pipeline.device, pipeline.transformer.dtype),
            ).audios
    return [clip.float().cpu() for clip in clips]


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


def write_spectrograms(path: Path, clips: dict[str, Tensor], rate: int) -> Path:
    """Mel spectrograms [2, samples] under their titles, side by side on one decibel scale, as a PNG."""
    import librosa
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(clips), 3.5), layout="constrained")
    for axes, (title, audio) in zip(figure.subplots(1, len(clips), squeeze=False)[0], clips.items(), strict=True):
        mel = librosa.feature.melspectrogram(y=audio.mean(0).numpy(), sr=rate, n_mels=96, n_fft=1024, hop_length=256)
        seconds = audio.shape[-1] / rate
        decibels = librosa.power_to_db(mel, ref=1.0, top_db=None)
        axes.imshow(
            decibels, origin="lower", aspect="auto", extent=(0, seconds, 0, 96), vmin=-60, vmax=30, cmap="magma"
        )
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
    """A clip and its spectrogram per seed; with `compare`, also the same seeds without the adapters, side by side."""
    before = generate(pipeline, request) if compare and paths else []
    add_adapters(pipeline, paths, scales)
    rate, written = pipeline.sample_rate, []
    for i, (seed, clip) in enumerate(zip(request.seeds, generate(pipeline, request), strict=True)):
        clips = {f"seed {seed}": clip}
        written.append(write_audio(folder / f"seed_{seed}.{suffix}", clip, rate))
        if before:
            clips = {f"seed {seed}, base model": before[i], f"seed {seed}, with adapter": clip}
            written.append(write_audio(folder / f"seed_{seed}_base.{suffix}", before[i], rate))
        written.append(write_spectrograms(folder / f"seed_{seed}.png", clips, rate))
    return written
