"""Flow matching, as a few pure functions.

One sign convention, stated once: noise lives at t = 1, data at t = 0, and the network predicts v = noise - data.
Source: ACE-Step 1.5 `AceStepConditionGenerationModel.forward`; Lipman et al. 2023 (arXiv:2210.02747).
"""

import torch
from torch import Tensor


def noisy(data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = t * noise + (1 - t) * data, for data and noise [b, t, c] and t [b] in [0, 1]."""
    t = t.view(-1, 1, 1)
    return t * noise + (1 - t) * data


def velocity(data: Tensor, noise: Tensor) -> Tensor:
    """dx_t / dt along the straight path, the regression target [b, t, c]."""
    return noise - data


def item_losses(prediction: Tensor, target: Tensor, frames: Tensor) -> Tensor:
    """Mean squared error of each item over its own real frames: [b, t, c], [b, t, c], frames [b] -> [b].

    An item's loss does not depend on how much padding its neighbours brought, so a padded batch equals its items alone.
    """
    error = (prediction.float() - target.float()).square().mean(-1)  # [b, t]
    real = torch.arange(error.shape[1], device=error.device) < frames.unsqueeze(1)
    return error.masked_fill(~real, 0).sum(1) / frames


def euler_step(x_t: Tensor, v: Tensor, t: float, t_next: float) -> Tensor:
    """One step of the sampler from t down to t_next (t_next = 0 ends on the data estimate x_t - t * v)."""
    return x_t - (t - t_next) * v
