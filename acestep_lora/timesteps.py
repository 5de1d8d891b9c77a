"""Which noise levels are trained: each sampler is a quantile function, uniform numbers in, timesteps out.

A quantile function needs one uniform number per sample, so stratified numbers (one from each n-th of [0, 1)) give
stratified timesteps for every sampler, without a second code path.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class LogitNormal:
    """The larger of two draws of sigmoid(N(mu, sigma)), which is what upstream's `sample_t_r` trains on.

    P(max < t) = F(t)^2, so t = sigmoid(mu + sigma * Phi^-1(sqrt(u))). Mean 0.536 at the published mu -0.4, sigma 1;
    a single draw would have mean 0.418. Under 1 % of the draws exceed 0.9, where turbo inference starts: see Mixture.
    """

    mu: float = -0.4
    sigma: float = 1.0

    def __call__(self, u: Tensor) -> Tensor:
        """u [n] in [0, 1) -> t [n] in (0, 1), float32."""
        root = u.double().sqrt().clamp(1e-9, 1 - 1e-9)
        return torch.sigmoid(self.mu + self.sigma * torch.special.ndtri(root)).float()


def schedule(steps: int, shift: float) -> Tensor:
    """The sampler's timesteps [steps] from 1 down: linspace warped by shift * t / (1 + (shift - 1) * t).

    `steps` 8 and `shift` 3 give the table of the turbo models (acestep `training/trainer.py`).
    """
    t = torch.linspace(1, 0, steps + 1)[:-1]
    return shift * t / (1 + (shift - 1) * t)


@dataclass(frozen=True)
class Discrete:
    """Only the noise levels the sampler visits, equally often (the official trainer's choice, at steps 8, shift 3)."""

    steps: int = 8
    shift: float = 3.0

    def __call__(self, u: Tensor) -> Tensor:
        table = schedule(self.steps, self.shift).to(u.device)
        return table[(u * self.steps).long().clamp(max=self.steps - 1)]


@dataclass(frozen=True)
class Uniform:
    low: float = 0.0
    high: float = 1.0

    def __call__(self, u: Tensor) -> Tensor:
        return self.low + (self.high - self.low) * u.float()


@dataclass(frozen=True)
class Mixture:
    """Component i with probability weights[i]; the weights need not sum to one."""

    components: list = field(default_factory=list)
    weights: list = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.components or len(self.components) != len(self.weights) or min(self.weights) <= 0:
            raise ValueError(f"timesteps.weights needs one positive number per component, got {list(self.weights)}.")

    def __call__(self, u: Tensor) -> Tensor:
        edges = torch.tensor([0.0, *self.weights], dtype=torch.float64).cumsum(0)
        edges = (edges / edges[-1]).to(u.device)
        chosen = torch.bucketize(u.double(), edges[1:-1], right=True)
        inside = (u - edges[chosen]) / (edges[chosen + 1] - edges[chosen])  # again uniform in [0, 1)
        each = torch.stack([component(inside.clamp(0, 1 - 1e-7)) for component in self.components])
        return each.gather(0, chosen.unsqueeze(0)).squeeze(0)
