"""Oobleck's encoder on songs of any length: equal to encoding a song in one piece, in less memory and time.

A plain `vae.encode` of half a minute moves arrays through main memory that are many times the size of the song, and
most of its time goes to that and to Snake's temporaries. Here a song goes through in windows, and a window through each
block in tiles that stay in the processor's cache; both overlap by the receptive field, so nothing is approximated.
Weight normalisation is folded once. On the CPU, windows run side by side with one thread each.
"""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from diffusers.models.autoencoders.autoencoder_oobleck import OobleckResidualUnit, Snake1d
from torch import Tensor, nn

from acestep_lora import basemodel
from acestep_lora.data.audio import Spool

_TILE = {"cpu": 1 << 19}  # numbers in a tile of one layer: about a core's L2 cache
_TILE_ELSEWHERE = 1 << 24


class Snake(nn.Module):
    """x + sin(alpha x)^2 / beta, with one array besides x."""

    def __init__(self, snake: Snake1d) -> None:
        super().__init__()
        scale = torch.exp if snake.logscale else torch.clone
        self.register_buffer("alpha", scale(snake.alpha.detach()))
        self.register_buffer("gain", (scale(snake.beta.detach()) + 1e-9).reciprocal())

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.alpha).sin_().square_().mul_(self.gain).add_(x)


def streamline(encoder: nn.Module) -> nn.Module:
    """The same function of the same weights, without what it computes again and again."""
    for module in encoder.modules():
        if isinstance(module, nn.Conv1d):
            nn.utils.remove_weight_norm(module)
    for module in list(encoder.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, OobleckResidualUnit) and not any(p.any() for p in child.conv2.parameters()):
                setattr(module, name, nn.Identity())  # it adds nothing: nano's units at full sample rate
            elif isinstance(child, Snake1d):
                setattr(module, name, Snake(child))
    return encoder


def load_encoder(base: basemodel.BaseModel, device: str | torch.device) -> nn.Module:
    """A base model's VAE without its decoder, in float32, its encoder streamlined."""
    vae = basemodel.load_vae(base, torch.float32, device)
    del vae.decoder
    streamline(vae.encoder)
    return vae


def receptive_frames(ratios: list[int]) -> int:
    """How many latent frames to either side can reach one frame of Oobleck's encoder, rounded up.

    Three residual units (kernel 7, dilations 1, 3, 9) and a strided convolution per ratio, kernels 7 and 3 at the ends.
    """
    radius, rate = 3, 1
    for ratio in ratios:
        radius += (39 + 2 * ratio) * rate
        rate *= ratio
    return math.ceil((radius + rate) / rate) + 1


def pieces(total: int, core: int, margin: int) -> Iterator[tuple[slice, slice]]:
    """Overlapping pieces of `total` frames: (what to compute, which of its results to keep)."""
    for start in range(0, max(total, 1), core):
        first, stop = max(0, start - margin), start + core
        last = stop >= total
        yield slice(first, None if last else stop + margin), slice(start - first, None if last else stop - first)


def _in_tiles(block: nn.Module, x: Tensor) -> Tensor:
    """One OobleckEncoderBlock, [1, c, n] -> [1, d, n // stride]."""
    stride = block.conv1.stride[0]
    margin = math.ceil((39 + 2 * stride) / stride)
    core = max(8 * margin, _TILE.get(x.device.type, _TILE_ELSEWHERE) // (x.shape[1] * stride))
    tiles = []
    for compute, keep in pieces(x.shape[-1] // stride, core, margin):
        stop = None if compute.stop is None else compute.stop * stride
        tiles.append(block(x[..., compute.start * stride : stop])[..., keep])
    return torch.cat(tiles, dim=-1)


def _posterior(vae: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Samples [1, 2, n] -> posterior mean and std [T, C]."""
    encoder = vae.encoder
    x = encoder.conv1(x)
    for block in encoder.block:
        x = _in_tiles(block, x)
    mean, scale = encoder.conv2(encoder.snake1(x))[0].T.float().cpu().chunk(2, dim=1)
    return mean, nn.functional.softplus(scale) + 1e-4


@contextmanager
def _threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """Threads on one core each: cores that share every small tile would mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(count) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


def encode_windows(vae: nn.Module, audio: Spool, seconds: float = 10.0) -> tuple[Tensor, Tensor]:
    """Posterior mean and std [T, C] of a whole song, in windows whose overlap covers the encoder's receptive field.

    Equal to encoding the song in one piece (float32: to rounding), in memory that does not grow with its length.
    The VAE's encoder is to be streamlined.
    """
    ratios = vae.config.downsampling_ratios
    hop, margin = math.prod(ratios), receptive_frames(ratios)
    total, longest = audio.frames // hop, max(1, round(seconds * vae.config.sampling_rate / hop))
    threads = torch.get_num_threads() if vae.device.type == "cpu" else 1
    rounds = max(1, math.ceil(total / (longest * threads)))
    core = max(1, math.ceil(total / (rounds * threads)))  # as long as can be, so that every thread has as many

    @torch.inference_mode()  # which is a thread's own
    def encode(piece: tuple[slice, slice]) -> list[Tensor]:
        compute, keep = piece
        stop = audio.frames if compute.stop is None else min(compute.stop * hop, audio.frames)
        samples = torch.from_numpy(audio.read(compute.start * hop, stop).T)
        return [part[keep] for part in _posterior(vae, samples[None].to(vae.device, vae.dtype))]

    with _threads(threads) as pool:
        parts = list(pool.map(encode, pieces(total, core, margin)))
    means, stds = zip(*parts, strict=True)
    return torch.cat(means), torch.cat(stds)
