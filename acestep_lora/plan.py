"""What a training step will take, before a GPU is touched: python -m acestep_lora.plan [train.py's overrides]

One step of the configured job runs under fake tensors, which have shapes and no data: no weights, no GPU, seconds. What
the tensors of that step would occupy is counted as they come and go. What no such count sees, the CUDA context, the
libraries' workspaces and fragmentation, is an allowance of its own, and predicted, not measured.
"""

import functools
import logging
import math
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from acestep_lora import basemodel, costs, sharding
from acestep_lora.dit import AceStepDiT
from acestep_lora.errors import UserError
from acestep_lora.hardware import Hardware
from acestep_lora.job import Job, Step, materialise
from acestep_lora.module import FlowModule
from acestep_lora.runs import plan_length

log = logging.getLogger(__name__)

GIB = 2**30
CARDS_GB = (8, 12, 16, 24, 48, 80)
ALLOWANCE = 0.6 * GIB
"""Workspaces and context of CUDA, and what fragmentation loses; predicted."""
UNPLANNED_SECONDS = 240.0
"""Length of a song when neither crop nor dataset says how long they are."""
PEAK_TFLOPS = {"RTX 3060": 51, "RTX 3090": 71, "RTX 4090": 165, "A100": 312, "H100": 989}
"""Dense half-precision tensor operations per second, float32 accumulation, from the makers' data sheets."""
UTILISATION = 0.4
"""Share of the peak that training of this size is taken to reach; predicted."""


class Meter(TorchDispatchMode):
    """Counts the bytes of the storages that live while it is on: `now`, and the most there were, `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def freed(_: weakref.ref) -> None:
            self.now -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)


@dataclass(frozen=True)
class Prediction:
    """Bytes by part at the fullest moment of a step, once the optimizer has its states."""

    base: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def peak(self) -> int:
        """What `torch.cuda.max_memory_allocated` would say."""
        return self.base + self.adapter + self.gradients + self.optimizer + self.activations

    @property
    def total(self) -> float:
        return self.peak + ALLOWANCE


def _bytes(tensors: Iterable) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in tensors if isinstance(leaf, torch.Tensor))


def optimizer_bytes(make: Callable[..., torch.optim.Optimizer], shapes: Iterable[torch.Size]) -> int:
    """What an optimizer keeps for parameters of these shapes, seen by a real step of each: some look at the numbers."""

    @functools.cache
    def kept(shape: torch.Size) -> int:
        weight = torch.nn.Parameter(torch.ones(shape))
        weight.grad = torch.ones(shape)
        optimizer = make([weight])
        optimizer.step()
        return _bytes(tree_leaves(dict(optimizer.state[weight])))

    return sum(kept(shape) for shape in shapes)


def predict(job: Job) -> Prediction:
    """Memory of one optimizer step."""
    module = job.module("meta")
    with FakeTensorMode(), Meter() as meter:
        materialise(module, job.cfg.model.quantize)
        step = Step(job, module)
        for weight in module.trainable().values():  # those of the step before live on while the next runs forward
            weight.grad = torch.empty_like(weight)
        step.gradients()
    trained = list(module.trainable().values())
    adapter, frozen = _bytes(trained), _bytes([*module.parameters(), *module.buffers()]) - _bytes(trained)
    gradients = _bytes(weight.grad for weight in trained)
    averaged = adapter if job.cfg.ema.decay is not None else 0
    states = optimizer_bytes(module.make_optimizer, [weight.shape for weight in trained])
    return Prediction(frozen, adapter + averaged, gradients, states, meter.peak - frozen - adapter - gradients)


def count_flops(job: Job) -> tuple[int, dict[str, int]]:
    """FLOPs of one micro-batch, and the least there can be, by part."""
    module = job.module("meta")
    with FakeTensorMode():
        materialise(module, job.cfg.model.quantize)
        step = Step(job, module)
        step.micro_batches = 1
        flops = costs.count(step.gradients)
    sizes = {name: weight.numel() for name, weight in module.trainable().items()}
    return flops, costs.minimum(job.shape, job.cfg.dataset.batch_size, job.frames, job.tokens, sizes)


# ---------------------------------------------------------------- what to plan


def job_of(cfg: DictConfig, hardware: Hardware, base: basemodel.BaseModel | None, seconds: float | None = None) -> Job:
    """The job of a training config: sizes of the checkpoint where there is one, else the published ones.

    seconds: the longest song; `dataset.crop_seconds`, where set, is the planned length even when songs are shorter.
    """
    shape, rate = transformer_shape(cfg, base), frame_rate(cfg, base)
    length = cfg.dataset.crop_seconds or seconds or UNPLANNED_SECONDS
    padded = cfg.conditioning.padded
    tokens = cfg.conditioning.text_tokens + cfg.conditioning.lyric_tokens + 1 if padded else cfg.model.condition_tokens
    kernel = hardware.attention
    if kernel == "auto" and hardware.device == "cuda":
        kernel = "flash" if hardware.dtype == torch.bfloat16 else "blocks"
    job = Job(cfg, hardware, shape, max(1, round(length * rate)), tokens, rate, attention=kernel)
    if hardware.recompute == "auto":
        return job
    layers = {"none": 0, "all": job.depth}.get(hardware.recompute, hardware.recompute)
    return job.but(recompute=min(layers, job.depth))


def transformer_shape(cfg: DictConfig, base: basemodel.BaseModel | None) -> Mapping:
    """Config of the transformer. A checkpoint's own wins over the published one; differences are told."""
    published = OmegaConf.to_container(cfg.model.shape.transformer) if cfg.model.shape else {}
    if base is None:
        if not published:
            raise UserError(f"model={cfg.model.name} has no published sizes to plan with: give model.path.")
        return published
    config = basemodel.accepted_config(base.dit, AceStepDiT, "decoder")
    for name, value in published.items():
        if config.get(name, value) != value:
            log.info("%s: %s is %s, model=%s is published with %s", base.dit, name, config[name], cfg.model.name, value)
    return config


def frame_rate(cfg: DictConfig, base: basemodel.BaseModel | None) -> float:
    """Latents per second."""
    vae = basemodel.read_config(base.vae) if base else cfg.model.shape.vae
    return vae["sampling_rate"] / math.prod(vae["downsampling_ratios"])


class Recompute:
    """How much memory a job takes by the number of its recomputed layers, from three predictions.

    The fullest moment is either the end of the forward pass, which every recomputed layer relieves by the same amount,
    or a layer being computed again, which the others' number does not change.
    """

    def __init__(self, job: Job) -> None:
        self.job, self.none = job, predict(job.but(recompute=0))

    @functools.cached_property
    def all(self) -> Prediction:
        return predict(self.job.but(recompute=self.job.depth))

    @functools.cached_property
    def relief(self) -> float:
        """Bytes that a recomputed layer saves."""
        few = min(4, self.job.depth)  # sliding and full layers differ, so in pairs
        return (self.none.peak - predict(self.job.but(recompute=few)).peak) / few

    def at(self, layers: int) -> Prediction:
        if layers == 0:  # most jobs fit as they are, and then one prediction is enough
            return self.none
        saved = min(layers * self.relief, self.none.peak - self.all.peak)
        return replace(self.none, activations=round(self.none.activations - saved))

    def fewest(self, memory: float) -> int | None:
        """The fewest layers with which the job fits; None when even all do not suffice."""
        return next((n for n in range(self.job.depth + 1) if self.at(n).total <= memory), None)

    def chosen(self) -> int:
        """As configured; under "auto" the fewest layers with which the job fits, or all where even they do not do."""
        memory = self.job.hardware.memory
        if self.job.hardware.recompute != "auto" or memory is None:
            return self.job.recompute
        fewest = self.fewest(memory)
        return self.job.depth if fewest is None else fewest


def choose(job: Job) -> int:
    """How many layers a run recomputes. Raises UserError, before weights are loaded, when the job cannot fit."""
    memory = job.hardware.memory
    if memory is None:
        return job.recompute
    if job.hardware.recompute == "auto":
        plan = Recompute(job)
        layers = plan.chosen()
        predicted = plan.at(layers)
    else:
        layers, predicted = job.recompute, predict(job)
    if predicted.total > memory:
        raise UserError(
            f"This job needs {gib(predicted.total)} GiB (predicted) and there are {gib(memory)}: {remedy(job, memory)}."
        )
    log.info("%d of %d layers recomputed, %s GiB predicted", layers, job.depth, gib(predicted.total))
    return layers


def remedy(job: Job, memory: float) -> str:
    """The overrides, from the least to the most intrusive, that make a job fit with every layer recomputed."""
    small, all = job.cfg.copy(), job.but(recompute=job.depth)
    items = small.dataset.batch_size
    small.dataset.batch_size = 1
    packed = small.copy()
    packed.model.quantize = "nf4"
    accumulate = f"dataset.batch_size=1 trainer.accumulate_grad_batches={items * small.trainer.accumulate_grad_batches}"
    tries = [("hardware.recompute=auto", all)]
    tries += [(accumulate, all.but(cfg=small))] if items > 1 else []
    lengths = [seconds for seconds in (120, 60, 30) if seconds * job.rate < job.frames]
    tries += [(f"dataset.crop_seconds={s}", all.but(cfg=small, frames=round(s * job.rate))) for s in lengths]
    tries += [("model.quantize=nf4", all.but(cfg=packed))]
    tries += [(f"model.quantize=nf4 {text}", tried.but(cfg=packed)) for text, tried in tries if "crop" in text]
    for overrides, tried in tries:
        if predict(tried).total <= memory:
            return f"{overrides} would make it fit"
    return "no setting known to the planner makes it fit; a smaller model or adapter.r may"


def make_module(cfg: DictConfig, base: basemodel.BaseModel, hardware: Hardware, tracks: list) -> FlowModule:
    """The FlowModule of a run, its weights not yet read. Raises UserError for a job that does not fit into memory."""
    if hardware.strategy == "fsdp2":
        sharding.check(cfg.model.quantize, cfg.optimizer._target_)
    longest = max((track.duration for track in tracks), default=None)
    return instantiate(cfg.module, _partial_=True)(
        base,
        dtype=hardware.dtype,
        recompute=choose(job_of(cfg, hardware, base, longest)),
        attention=hardware.attention,
        compile=hardware.compile,
    )


# ---------------------------------------------------------------- preprocessing


def predict_vae(cfg: DictConfig, base: basemodel.BaseModel | None) -> int:
    """Peak bytes of encoding audio: the VAE in float32 and one window of a song."""
    from diffusers import AutoencoderOobleck

    from acestep_lora.data.oobleck import receptive_frames

    published = cfg.model.shape and OmegaConf.to_container(cfg.model.shape.vae)
    config = basemodel.accepted_config(base.vae, AutoencoderOobleck, "vae") if base else published
    ratios, rate = config["downsampling_ratios"], config["sampling_rate"]
    frames = round(10 * rate / math.prod(ratios)) + 2 * receptive_frames(ratios)
    with torch.device("meta"):
        vae = AutoencoderOobleck(**config).requires_grad_(False)
    with FakeTensorMode(), Meter() as meter, torch.no_grad():
        materialise(vae)
        vae.encode(torch.randn(1, config["audio_channels"], frames * math.prod(ratios)))
    return meter.peak


def predict_decode(base: basemodel.BaseModel, seconds: float, dtype: torch.dtype) -> int:
    """Peak bytes of making audio of latents, for a preview: the VAE and a clip."""
    from diffusers import AutoencoderOobleck

    config = basemodel.accepted_config(base.vae, AutoencoderOobleck, "vae")
    with torch.device("meta"):
        vae = AutoencoderOobleck(**config).to(dtype).requires_grad_(False)
    with FakeTensorMode(), Meter() as meter, torch.no_grad():
        materialise(vae)
        vae.decode(torch.randn(1, config["decoder_input_channels"], math.ceil(seconds * base.frame_rate), dtype=dtype))
    return meter.peak


def predict_text(cfg: DictConfig, hardware: Hardware, base: basemodel.BaseModel | None) -> int:
    """Peak bytes of encoding prompt and lyrics: text encoder and condition encoder."""
    from diffusers.pipelines.ace_step import AceStepConditionEncoder
    from transformers import AutoConfig, Qwen3Config, Qwen3Model

    if base:
        text_config = AutoConfig.from_pretrained(base.text_encoder, local_files_only=True, trust_remote_code=False)
    else:
        text_config = Qwen3Config(**OmegaConf.to_container(cfg.model.shape.text_encoder))
    config = basemodel.accepted_config(base.condition, AceStepConditionEncoder, "encoder") if base else {}
    with torch.device("meta"):
        text = Qwen3Model(text_config).to(hardware.dtype).requires_grad_(False)
        condition = nn.Module.to(AceStepConditionEncoder(**config), hardware.dtype).requires_grad_(False)
    tokens, lyrics = cfg.conditioning.text_tokens, cfg.conditioning.lyric_tokens
    with FakeTensorMode(), Meter() as meter, torch.no_grad():
        materialise(text)
        materialise(condition)
        states = text(input_ids=torch.zeros(1, tokens, dtype=torch.long)).last_hidden_state
        condition.text_projector(states)
        condition.lyric_encoder(  # the widest part; the timbre's, a fifth as long, looks at its numbers
            inputs_embeds=torch.zeros(1, lyrics, states.shape[-1], dtype=hardware.dtype),
            attention_mask=torch.ones(1, lyrics, dtype=torch.bool),
        )
    return meter.peak


# ---------------------------------------------------------------- the report


def gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def show(job: Job, tracks: int | None, stages: Mapping[str, int], console: Console) -> None:
    """Print what a job takes: by part, on which card, for how long."""
    cfg, plan, memory = job.cfg, Recompute(job), job.hardware.memory
    layers = plan.chosen()
    predicted = plan.at(layers)
    console.print(
        f"model={cfg.model.name} adapter={cfg.adapter.name} quantize={cfg.model.quantize}, batch "
        f"{cfg.dataset.batch_size} of {job.frames / job.rate:.0f} s ({job.frames} frames, {job.tokens} condition "
        f"states), {job.hardware.resolved_precision()}, {layers} of {job.depth} layers recomputed. All predicted."
    )
    table = Table("part", "GiB")
    for name in ("base", "adapter", "gradients", "optimizer", "activations"):
        table.add_row(name, gib(getattr(predicted, name)))
    table.add_row("workspace allowance", gib(ALLOWANCE), end_section=True)
    table.add_row("together", gib(predicted.total))
    for stage, size in stages.items():
        table.add_row(f"preprocessing: {stage}", gib(size + ALLOWANCE))
    console.print(table)

    table = Table("card", "layers recomputed", "GiB")
    for card in CARDS_GB:
        fewest = plan.fewest(card * GIB)
        fits = fewest is not None
        table.add_row(
            f"{card} GiB", str(fewest) if fits else "does not fit", gib(plan.at(fewest).total) if fits else ""
        )
    console.print(table)
    if memory is not None and predicted.total > memory:
        console.print(f"{gib(memory)} GiB are too few: {remedy(job, memory)}.")
    show_time(job.but(recompute=layers), tracks, console)


def show_time(job: Job, tracks: int | None, console: Console) -> None:
    flops, least = count_flops(job)
    step = flops * job.cfg.trainer.accumulate_grad_batches
    console.print(f"FLOPs of a step: {step:.4g}, {flops / sum(least.values()):.3f} x the least possible")
    if tracks is None:
        console.print("Give dataset.dir for the length of the whole run.")
        return
    steps = plan_length(job.cfg, tracks).total_steps
    console.print(f"{tracks} songs, {steps} steps, {step * steps:.3g} FLOPs in all")
    for card, tflops in PEAK_TFLOPS.items():
        hours = step * steps / (tflops * 1e12 * UTILISATION) / 3600
        console.print(f"  {card}: {hours:.1f} h at {UTILISATION:.0%} utilisation")


def main(cfg: DictConfig) -> int:
    """Plan the job of a training config."""
    from acestep_lora import runs
    from acestep_lora.data.track import scan

    hardware = instantiate(cfg.hardware)
    base = runs.find_base(cfg.model) if cfg.model.path else None
    tracks = scan(cfg.dataset.dir).tracks if cfg.dataset.dir else None
    seconds = max((track.duration for track in tracks), default=None) if tracks else None
    stages = {"VAE": predict_vae(cfg, base), "text and condition encoders": predict_text(cfg, hardware, base)}
    show(job_of(cfg, hardware, base, seconds), len(tracks) if tracks else None, stages, Console())
    return 0


if __name__ == "__main__":
    from acestep_lora import cli

    cli.main("train", main)
