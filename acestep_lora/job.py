"""One training step of a configured job, without songs: run for real, or under fake tensors to see what it costs."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor, nn

from acestep_lora.data.items import Batch
from acestep_lora.dit import AceStepDiT
from acestep_lora.hardware import Hardware
from acestep_lora.module import FlowModule
from acestep_lora.quantize import PackedShape, quantize


@dataclass(frozen=True)
class Job:
    """What the cost of a step depends on: the config, the transformer's shape, the size of a batch.

    Attributes:
        shape: config of the transformer, as diffusers takes it.
        frames: latents of an item; tokens: condition states of an item; rate: latents per second.
        recompute: layers computed again in the backward pass; attention: of the sliding layers (`attention.KINDS`).
    """

    cfg: DictConfig
    hardware: Hardware
    shape: Mapping
    frames: int
    tokens: int
    rate: float
    recompute: int = 0
    attention: str = "auto"

    def but(self, **changes) -> "Job":
        return replace(self, **changes)

    @property
    def depth(self) -> int:
        return self.shape["num_hidden_layers"]

    @property
    def condition_width(self) -> int:
        return self.shape.get("encoder_hidden_size") or self.shape["hidden_size"]

    def module(self, device: str) -> FlowModule:
        """The job's module with an untrained transformer: real on "cpu", without memory on "meta"."""
        compiled = self.hardware.compile and device != "meta"  # what the compiler saves is not planned for
        module = instantiate(self.cfg.module, _partial_=True)(
            None, dtype=self.hardware.dtype, recompute=self.recompute, attention=self.attention, compile=compiled
        )
        channels = self.shape["audio_acoustic_hidden_dim"]
        kind = self.cfg.model.quantize
        with torch.device(device):
            dit = nn.Module.to(AceStepDiT(**self.shape), self.hardware.dtype).requires_grad_(False)
            if kind != "none" and device != "meta":
                quantize(dit, kind, device)
            null = torch.zeros(self.condition_width)
            module.take(dit, null, torch.zeros(self.frames, channels))
        return module

    def batch(self) -> Batch:
        items, channels = self.cfg.dataset.batch_size, self.shape["audio_acoustic_hidden_dim"]
        no = torch.zeros(items, dtype=torch.bool)
        condition = torch.randn(items, self.tokens, self.condition_width, dtype=self.hardware.dtype)
        return Batch(
            latents=torch.randn(items, self.frames, channels),
            noise=torch.randn(items, self.frames, channels),
            t=torch.rand(items),
            condition=condition,
            frames=torch.full((items,), self.frames),
            weight=torch.ones(items),
            dropped=no,
            hinted=no,
            level=torch.zeros(items, dtype=torch.long),
            hints=None,
            condition_mask=None,
            frame_mask=None,
            window=items,
            key=0,
            tracks=["planned"] * items,
            prior=None if self.cfg.preservation.weight is None else condition,
        )


class Step:
    """A module, its optimizer and a batch. `run` is an optimizer step, in the order in which Lightning takes one."""

    def __init__(self, job: Job, module: FlowModule) -> None:
        self.job, self.module, self.batch = job, module, job.batch()
        self.micro_batches = min(2, job.cfg.trainer.accumulate_grad_batches)  # a third is like the second

    @cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.module.make_optimizer(list(self.module.trainable().values()))

    def run(self) -> Tensor:
        loss = self.gradients()
        self.update()
        return loss

    def gradients(self) -> Tensor:
        for i in range(self.micro_batches):
            loss = self.forward()
            if i == 0:
                self.module.zero_grad()
            loss.backward()
        return loss.detach()

    def forward(self) -> Tensor:
        with self.job.hardware.autocast(self.batch.latents.device):
            return self.module.objective(self.batch)[0].mean()

    def update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.module.trainable().values(), 1.0)
        self.optimizer.step()


def materialise(module: nn.Module, quantize: str = "none") -> None:
    """Give what is on the meta device memory of its size; under fake tensors, the semblance of it.

    quantize: how the linear layers of a transformer's blocks, `layers`, are to be packed.

    Module.to_empty would do, but torch swaps parameters of fake tensors in a way that PEFT's references forbid.
    """
    for name, child in list(module.named_modules()):
        if quantize != "none" and ".layers." in name and type(child) is nn.Linear and ".lora_" not in name:
            module.set_submodule(name, PackedShape(child, quantize))
        if hasattr(child, "module_dropout"):  # decided by a number, which fake tensors do not have
            child.module_dropout = dict.fromkeys(child.module_dropout, 0.0)
    for child in module.modules():
        for store in (child._parameters, child._buffers):
            for name, value in store.items():
                if value is not None and value.is_meta:
                    empty = torch.empty(value.shape, dtype=value.dtype)
                    store[name] = nn.Parameter(empty, value.requires_grad) if isinstance(value, nn.Parameter) else empty
