"""Randomness as a function of names, not of a state.

Every draw of a run comes from a generator keyed by (seed, what it is for, epoch, position, track id). It therefore does
not depend on rank, worker, batch shape or what was drawn before, which is what makes resuming exact at any step.
"""

import hashlib

import torch


def key(*names: object) -> int:
    """A 63-bit number for a tuple of ints and strings, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(names).encode(), digest_size=8).digest(), "little") >> 1


def generator(*names: object) -> torch.Generator:
    return torch.Generator().manual_seed(key(*names))
