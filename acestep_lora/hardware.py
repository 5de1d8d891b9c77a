"""The machine a job runs on: device, precision, memory, how many."""

import re
from dataclasses import dataclass, replace

import torch

from acestep_lora import attention
from acestep_lora.errors import UserError

_FROZEN = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
_GIB = 2**30


@dataclass(frozen=True)
class Hardware:
    """Options of one machine. `precision` None takes bfloat16 autocast where the device has it, else float32.

    Adapter weights and optimizer states are float32 in every precision; it decides the frozen base and the compute.
    `strategy` is "auto", "ddp" (every device holds the model), "fsdp2" (the devices share it) or another that Lightning
    knows by name. `recompute` is "none", "all", "auto" or a number of layers; `vram_gb` (GiB) is what "auto" fits into.
    `dataset` and `trainer` follow `batch_size` and `accumulate_grad_batches`.
    """

    accelerator: str = "auto"
    devices: int | str = 1
    num_nodes: int = 1
    strategy: str = "auto"
    precision: str | None = None
    vram_gb: float | None = None
    recompute: int | str = "auto"
    attention: str = "auto"
    compile: bool = False
    num_workers: int = 0
    batch_size: int = 1
    accumulate_grad_batches: int = 4

    def __post_init__(self) -> None:
        if self.precision is not None and self.precision not in _FROZEN:
            raise UserError(
                f"hardware.precision={self.precision} would round the adapter's updates away: use {', '.join(_FROZEN)}."
            )
        if self.strategy == "fsdp2" and self.resolved_precision() == "16-mixed":
            raise UserError("hardware.strategy=fsdp2 does not train in float16: use hardware.strategy=ddp.")
        number = isinstance(self.recompute, int) and not isinstance(self.recompute, bool) and self.recompute >= 0
        if self.recompute not in ("none", "all", "auto") and not number:
            raise UserError(f"hardware.recompute={self.recompute} is not none, all, auto or a number of layers.")
        if not re.fullmatch(r"auto|-1|[1-9]\d*|\[?\d+(, *\d+)*\]?", str(self.devices)):
            raise UserError(f"hardware.devices={self.devices} is not auto, a number, or a list such as [0,1].")
        if self.attention not in attention.KINDS:
            raise UserError(f"hardware.attention={self.attention} is none of {', '.join(attention.KINDS)}.")

    @property
    def device(self) -> str:
        if self.accelerator != "auto":
            return {"gpu": "cuda"}.get(self.accelerator, self.accelerator)
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"

    def resolved_precision(self) -> str:
        if self.precision is not None:
            return self.precision
        if self.device == "cuda":
            there = torch.cuda.is_available()  # a plan for a GPU is made anywhere
            return "16-mixed" if there and not torch.cuda.is_bf16_supported(including_emulation=False) else "bf16-mixed"
        return "32-true"

    @property
    def dtype(self) -> torch.dtype:
        """Of the frozen weights. On the CPU every frozen part computes in float32, whatever the checkpoint stores."""
        return torch.float32 if self.device == "cpu" else _FROZEN[self.resolved_precision()]

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of the products that autocast does."""
        return _FROZEN[self.resolved_precision()]

    @property
    def memory(self) -> float | None:
        """Bytes there are for training, None when nobody says so."""
        if self.vram_gb is not None:
            return self.vram_gb * _GIB
        if self.device == "cuda" and torch.cuda.is_available():
            return torch.cuda.get_device_properties(0).total_memory
        return None

    def autocast(self, device: torch.device) -> torch.autocast:
        """What Lightning's precision of this name does around a step."""
        precision = self.resolved_precision()
        return torch.autocast(device.type, _FROZEN[precision], enabled=precision != "32-true")

    def but(self, **changes) -> "Hardware":
        return replace(self, **changes)

    @property
    def processes(self) -> int:
        """How many ranks a run has, one per device."""
        devices = str(self.devices).strip("[] ")
        if devices in ("auto", "-1"):
            per_node = max(1, torch.cuda.device_count()) if self.device == "cuda" else 1
        else:
            per_node = len(devices.split(",")) if "," in devices else int(devices)
        return per_node * self.num_nodes

    def trainer_options(self, shard: bool = False) -> dict:
        """Arguments of a Lightning Trainer; `shard` is for the module that knows how to be dealt out (fsdp2)."""
        from lightning.pytorch.plugins.environments import SLURMEnvironment

        from acestep_lora.sharding import FSDP2

        strategy = self.strategy
        if strategy == "fsdp2":
            strategy = FSDP2() if shard else "auto"
        # Lightning's own requeueing would save elsewhere and resume from there, whatever `resume` says.
        plugins = [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else None
        return {
            "accelerator": {"cuda": "gpu"}.get(self.device, self.device),
            "devices": self.devices,
            "num_nodes": self.num_nodes,
            "strategy": strategy,
            "plugins": plugins,
        }
