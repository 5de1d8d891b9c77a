"""Steps that must not be taken: gradients that are not finite, losses far above what was usual."""

import logging

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from acestep_lora.errors import UserError

log = logging.getLogger(__name__)

USUAL = 20
"""Steps until the average loss is known well enough to call another one a spike."""

MEMORY = 100
"""Steps over which losses are averaged."""


class NumericError(UserError):
    """Numbers have stopped meaning anything; what was learnt before is kept."""


class Guard:
    """Decides which optimizer steps are skipped, and remembers whose songs they were.

    It decides on the device, without waiting for it; only `report` reads from there.

    Args:
        spike: a step is skipped when its loss exceeds the average by this factor; None never does.
        max_skipped: skipped steps in a row after which `report` raises NumericError.
    """

    def __init__(self, spike: float | None = 10.0, max_skipped: int = 10) -> None:
        if spike is not None and spike <= 1:
            raise UserError(f"module.spike must be above 1 or null, got {spike}.")
        if max_skipped < 1:
            raise UserError(f"module.max_skipped must be at least 1, got {max_skipped}.")
        self.spike, self.max_skipped = spike, max_skipped
        self.state = torch.zeros(5)  # average loss, steps in it, skipped steps, those in a row now, most in a row
        self._items: list[tuple[Tensor, list[str]]] = []  # losses [b] and songs of the step in progress
        self._steps: list[tuple[Tensor, list[tuple[Tensor, list[str]]]]] = []  # since `report`: state, items

    @property
    def skipped(self) -> Tensor:
        """How many steps were skipped so far [], on the device."""
        return self.state[2]

    def see(self, losses: Tensor, tracks: list[str]) -> None:
        """Losses [b] of a micro-batch of the step in progress."""
        self._items.append((losses, tracks))

    def judge(self, norm: Tensor, loss: Tensor, scaled: bool) -> Tensor:
        """Whether to skip the step, [] bool: its gradient norm and its mean loss, both on the device.

        scaled: gradients of a loss scaler may overflow, which it sees to itself.
        """
        average, steps, skipped, row, most = self.state.unbind()
        bad = ~loss.isfinite() if scaled else ~(loss.isfinite() & norm.isfinite())
        if self.spike is not None:
            bad = bad | ((steps >= USUAL) & (loss > self.spike * average))
        ahead = average + (loss - average) / (steps + 1).clamp(max=MEMORY)
        row = torch.where(bad, row + 1, 0.0)
        average, steps = torch.where(bad, average, ahead), torch.where(bad, steps, steps + 1)
        self.state = torch.stack([average, steps, skipped + bad, row, torch.maximum(most, row)])
        self._steps.append((self.state, self._items))
        self._items = []
        return bad

    def report(self, step: int) -> None:
        """Name the songs of the steps skipped since the last report. Raises NumericError when there are too many."""
        if not self._steps:
            return
        states = torch.stack([state for state, _ in self._steps]).tolist()
        rows = [
            (average, items) for (average, _, _, row, _), (_, items) in zip(states, self._steps, strict=True) if row
        ]
        names = list(dict.fromkeys(name for average, items in rows for name in self._culprits(average, items)))
        most = states[-1][4]
        self._steps.clear()
        self.state = self.state * torch.tensor([1, 1, 1, 1, 0], device=self.state.device)
        if not rows:
            return
        songs = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        told = (
            f"{len(rows)} of {len(states)} steps up to step {step} were skipped (loss not finite, or a spike): {songs}"
        )
        if most >= self.max_skipped:
            raise NumericError(
                f"{told}. Training stops after {most:.0f} in a row: lower optimizer.lr, and see whether these songs "
                "sound as they should; a base model with damaged weights does this from the first step on."
            )
        log.warning(told)

    def _culprits(self, average: float, items: list[tuple[Tensor, list[str]]]) -> list[str]:
        """The songs whose loss it was; all of the step where only its gradient was not finite."""
        pairs = [(loss, name) for losses, names in items for loss, name in zip(losses.tolist(), names, strict=True)]
        limit = float("inf") if self.spike is None or not average else self.spike * average
        return [name for loss, name in pairs if not loss < limit] or [name for _, name in pairs]


def skip(optimizer: Optimizer, bad: Tensor) -> None:
    """Let the optimizer leave weights and its own states alone where `bad` [], without waiting for the device.

    Fused optimizers can be told so on the device; others take no step without gradients, which the host decides, as it
    does for weights that are dealt out.
    """
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    if all(group.get("fused") for group in optimizer.param_groups) and not any(isinstance(w, DTensor) for w in weights):
        optimizer.found_inf, optimizer.grad_scale = bad.float(), None
    elif bad.item():
        optimizer.zero_grad(set_to_none=True)
