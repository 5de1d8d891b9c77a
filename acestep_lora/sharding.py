"""Weights dealt out among the devices of a run (FSDP2): `hardware.strategy=fsdp2`."""

from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from acestep_lora.errors import UserError

OPTIMIZERS = ("torch.optim.AdamW", "prodigyopt.Prodigy")
"""Those that take parameters of which each rank holds a part."""


def check(quantize: str, optimizer: str) -> None:
    """Raises UserError for what cannot be dealt out: packed weights, and optimizers other than `OPTIMIZERS`."""
    if quantize != "none":
        raise UserError(f"model.quantize={quantize} cannot be dealt out: use hardware.strategy=ddp with it.")
    if optimizer not in OPTIMIZERS:
        raise UserError(f"{optimizer} takes whole weights: use hardware.strategy=ddp, optimizer=adamw or prodigy.")


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on every rank; the ranks call it together where it is dealt out among them."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def dealt_like(value: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor dealt out as a parameter of its shape is."""
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    value = value.to(parameter.device, parameter.dtype)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements)


def _saved(state: Any) -> Any:
    return tree_map(lambda value: whole(value).cpu() if isinstance(value, DTensor) else value, state)


class FSDP2(ModelParallelStrategy):
    """Every rank holds its share of the frozen and of the trained weights, and gathers a layer when it needs it.

    A checkpoint is the one that a single device writes: either resumes the other's.
    """

    lightning_restore_optimizer = True

    def setup_environment(self) -> None:
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    def shard(self, model: nn.Module, layers: nn.ModuleList) -> None:
        """Deal out a model whose layers are used one after another."""
        from torch.distributed.fsdp import fully_shard

        for part in (*layers, model):
            fully_shard(part, mesh=self.device_mesh["data_parallel"], reshard_after_forward=True)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return _saved(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return _saved(Strategy.optimizer_state(self, optimizer))

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath, storage_options: Any | None = None) -> None:
        Strategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path, weights_only: bool | None = None) -> dict[str, Any]:
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: dict[str, Any], strict: bool = True) -> None:
        parameters = dict(self.lightning_module.named_parameters())
        state = {name: dealt_like(value, parameters[name]) for name, value in checkpoint["state_dict"].items()}
        self.lightning_module.load_state_dict(state, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: dict[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            dealt = {
                i: {
                    name: dealt_like(value, parameters[i]) if isinstance(value, Tensor) else value
                    for name, value in values.items()
                }
                for i, values in state["state"].items()
            }
            optimizer.load_state_dict(state | {"state": dealt})
