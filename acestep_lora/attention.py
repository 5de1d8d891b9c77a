"""Which patches may attend to which: the masks of the DiT's self-attention.

A mask is None wherever everything is allowed, so that the attention kernel is free to take its fastest path.
"""

import torch
from torch import Tensor


def full_mask(patches: Tensor | None) -> Tensor | None:
    """Real patches [b, n] (bool, or None when all are) -> mask [b, 1, 1, n] of the keys every query may see."""
    return None if patches is None else patches[:, None, None, :]


def sliding_mask(length: int, window: int, patches: Tensor | None, device: torch.device) -> Tensor | None:
    """The band |i - j| <= window of the sliding layers, without padding keys: [1 or b, 1, n, n] bool, or None.

    A padding query far from every real patch would see nothing, and softmax over nothing is NaN: it sees itself.
    """
    if length <= window + 1:
        return full_mask(patches)
    position = torch.arange(length, device=device)
    distance = (position[:, None] - position).abs()
    band = (distance <= window)[None, None]
    if patches is None:
        return band
    return band & full_mask(patches) | (distance == 0)
