"""Learning-rate schedules: transformers' own, with a warmup that short runs can afford."""

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from acestep_lora.errors import UserError


def schedule(optimizer: Optimizer, total_steps: int, name: str, warmup_steps: int, **options) -> LRScheduler:
    """A schedule by its name in `transformers.get_scheduler`, ending at step `total_steps`.

    `warmup_steps` is capped at 10 % of the run. `options` are the schedule's own, such as num_cycles of the restarts.
    """
    warmup = min(warmup_steps, total_steps // 10)
    try:
        return get_scheduler(name, optimizer, warmup, total_steps, scheduler_specific_kwargs=options)
    except ValueError as error:
        raise UserError(f"scheduler: {error}.") from None
