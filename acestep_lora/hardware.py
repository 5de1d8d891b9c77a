"""The machine a job runs on: device, precision, how many."""

from dataclasses import dataclass

import torch

_FROZEN = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


@dataclass(frozen=True)
class Hardware:
    """Options of one machine. `precision` None takes bfloat16 autocast where the device has it, else float32.

    Adapter weights and optimizer states are float32 in every precision; it decides the frozen base and the compute.
    """

    accelerator: str = "auto"
    devices: int | str = 1
    num_nodes: int = 1
    strategy: str = "auto"
    precision: str | None = None
    recompute: int | str = 0
    num_workers: int = 0

    def __post_init__(self) -> None:
        if self.precision is not None and self.precision not in _FROZEN:
            raise ValueError(
                f"hardware.precision={self.precision} would round the adapter's updates away: use {', '.join(_FROZEN)}."
            )

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
            return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"
        return "32-true"

    @property
    def dtype(self) -> torch.dtype:
        """Of the frozen weights. On the CPU every frozen part computes in float32, whatever the checkpoint stores."""
        return torch.float32 if self.device == "cpu" else _FROZEN[self.resolved_precision()]

    def trainer_options(self) -> dict:
        accelerator = {"cuda": "gpu"}.get(self.device, self.device)
        return {
            "accelerator": accelerator,
            "devices": self.devices,
            "num_nodes": self.num_nodes,
            "strategy": self.strategy,
        }
