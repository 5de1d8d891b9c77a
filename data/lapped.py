"""A codec written into Oobleck's weights: low frequencies as they are, high ones as levels; a decoder to train.

Low: the modified discrete cosine transform (Princen, Johnson, Bradley 1987). Oobleck's strided convolutions can hand
every sample down unchanged (a stride of 4 puts four samples into four channels), and its last one, twice as long as its
stride, can then be any lapped transform of frames that overlap by half. The MDCT's lowest coefficients are latents, and
the decoder's way back is the inverse transform: exact for the sum of both channels.

High: each band is one latent, its level. In a residual unit of the encoder's last block filters hear the band, Snake
squares what they hear (the linear part goes as every filter has its negative beside it), and the sum is the level. The
decoder plays a fixed burst of noise of the band at that level. The last latent is the balance: the level of left less
that of right.

All other residual units of the encoder are silent; data/oobleck.py leaves such units out.
"""

import math

import numpy as np
import torch
from diffusers import AutoencoderOobleck
from torch import Tensor, nn

LINEAR = 4.0  # log of the factor by which Snake on the main path is weaker than by default
QUIET = 0.1  # how loud a residual unit is at first, against PyTorch's initialisation
HEARING = (0.4, 1.2, 4.0)  # how soon the squares of what filters hear level off; 1: at a band's loudness
GAIN = 3.0  # music's RMS is about 0.1
NOISE = 0.45  # of a band's loudness, at level 1


def basis(hop: int, count: int) -> Tensor:
    """[2 hop, count]: window and cosine of the `count` lowest coefficients; orthonormal with its neighbours."""
    n, k = torch.arange(2 * hop, dtype=torch.float64)[:, None], torch.arange(count, dtype=torch.float64)
    window = torch.sin(math.pi * (n + 0.5) / (2 * hop))
    return (window * math.sqrt(2 / hop) * torch.cos(math.pi / hop * (n + 0.5 + hop / 2) * (k + 0.5))).float()


def _set(conv: nn.Module, weight: Tensor) -> None:
    """Replace the leading output and input channels of a weight-normalised convolution; the others stay random, small.

    `weight` has the convolution's own order of dimensions.
    """
    full = QUIET * conv.weight_v.clone()
    full[: weight.shape[0], : weight.shape[1]] = weight
    length = full.norm(dim=(1, 2), keepdim=True)
    conv.weight_g.copy_(length)
    conv.weight_v.copy_(torch.where(length > 0, full, 1.0))  # nothing has no direction


def _fold(stride: int, channels: int) -> Tensor:
    """[stride * channels, channels, 2 stride]: output channel (p, c) is sample p of channel c."""
    weight = torch.zeros(stride * channels, channels, 2 * stride)
    for p in range(stride):
        for c in range(channels):
            weight[p * channels + c, c, p + stride // 2] = 1
    return weight


def _lapped(rows: Tensor, inner: int, stride: int) -> Tensor:
    """Rows of samples [n, 2 hop] -> [n, 2 inner, 2 stride] over folded frames (sample, channel) of the middle."""
    weight = torch.zeros(len(rows), inner, 2, 2 * stride)
    weight[:, :, 0] = rows.reshape(len(rows), 2 * stride, inner).transpose(1, 2)
    return weight.flatten(1, 2)


def edges(rate: int, hop: int, low: int, bands: int) -> np.ndarray:
    """[bands + 1] in Hz, evenly spaced in pitch, from where `low` coefficients end to half the rate."""
    return np.geomspace(low * rate / (2 * hop), rate / 2, bands + 1)


def _filters(limits: np.ndarray, taps: int, rate: int) -> Tensor:
    """[bands, 4, taps]: a windowed tone in the middle of each band, a quarter period later, and their negatives.

    The window is so long that the filter is as wide as the band, or all of `taps`; a sine of amplitude a gives a.
    """
    t = (np.arange(taps) - (taps - 1) / 2) / rate
    length = np.minimum(taps / rate, 2 / np.diff(limits))[:, None]
    window = np.where(np.abs(t) < length / 2, np.cos(np.pi * t / length) ** 2, 0)
    angle = 2 * np.pi * np.sqrt(limits[:-1] * limits[1:])[:, None] * t
    tones = np.stack([np.cos(angle), np.sin(angle)], axis=1) * (window * 2 / window.sum(1, keepdims=True))[:, None]
    return torch.from_numpy(np.concatenate([tones, -tones], axis=1).astype(np.float32))


def _bursts(limits: np.ndarray, samples: int, rate: int) -> Tensor:
    """[bands, samples]: noise of each band, of unit RMS, under a sine window."""
    noise = np.fft.rfft(np.random.default_rng(0).standard_normal(samples))
    frequency, window = np.fft.rfftfreq(samples, 1 / rate), np.sin(np.pi * (np.arange(samples) + 0.5) / samples)
    bands = [
        np.fft.irfft(noise * ((frequency >= start) & (frequency < end)), samples)
        for start, end in zip(limits[:-1], limits[1:], strict=True)
    ]
    return torch.from_numpy(np.array([window * band / band.std() for band in bands], np.float32))


def _hear(unit: nn.Module, limits: np.ndarray, loudness: Tensor, inner: int, rate: int, first: int) -> None:
    """Make a residual unit write the bands' levels, and the balance, into its channels from `first` on.

    Every filter is there once for each of HEARING: the mean of sin^2 levels off at different loudness, so their sum
    grows about as the logarithm does. Left and right are heard in every second band. inner: samples of a step; those
    of the middle are channels 0, 2, ..., those of the side between them.
    """
    width, bands = unit.conv1.out_channels, len(limits) - 1
    filters = _filters(limits, 7 * inner, rate)
    sharpness = torch.pi / 2 / GAIN / loudness
    heard, alpha, out = [], [], torch.zeros(width, width)
    for factor in HEARING:
        for band in range(bands):
            out[first + band, 4 * len(heard) : 4 * len(heard) + 4] = 1 / len(HEARING)
            heard.append(torch.stack([filters[band], torch.zeros_like(filters[band])], dim=-1))
            alpha.append(factor * sharpness[band])
    for sign in (1, -1):
        for band in range(0, bands, 2):
            out[first + bands, 4 * len(heard) : 4 * len(heard) + 4] = 2 * sign / bands
            heard.append(torch.stack([filters[band], sign * filters[band]], dim=-1))
            alpha.append(sharpness[band])
    steps = torch.cat(heard).unflatten(1, (7, inner))  # [filters, 7, inner, 2]
    _set(unit.conv1, steps.transpose(1, 2).transpose(2, 3).flatten(1, 2))
    unit.snake1.beta.fill_(LINEAR)
    unit.snake2.alpha[0, : 4 * len(heard), 0] = torch.stack(alpha).log().repeat_interleave(4)
    _set(unit.conv2, out[..., None])


def _silence(unit: nn.Module) -> None:
    unit.conv2.weight_g.zero_()
    unit.conv2.bias.zero_()


@torch.no_grad()
def initialise(vae: AutoencoderOobleck, low: int, loudness: list[float]) -> None:
    """Write the codec; the decoder's residual units hardly speak yet.

    low: how many latents are coefficients; one is the balance, and each of the others has a `loudness`: RMS of its
    noise at level 1.
    """
    config, (encoder, decoder) = vae.config, (vae.encoder, vae.decoder)
    strides, latents, hop = config.downsampling_ratios, config.decoder_input_channels, vae.hop_length
    for name, parameter in vae.named_parameters():
        if "res_unit" in name and name.endswith("conv2.weight_g"):
            parameter *= QUIET
        elif name.endswith("bias"):
            parameter.zero_()
        elif "res_unit" not in name and name.endswith("snake1.beta"):
            parameter.fill_(LINEAR)
    halves = torch.tensor([[0.5, 0.5], [0.5, -0.5]])  # left, right -> middle, side
    first, last = torch.zeros(2, 2, 7), torch.zeros(2, 2, 7)
    first[:, :, 3], last[:, :, 3] = GAIN * halves, 2 * halves / GAIN
    _set(encoder.conv1, first)
    _set(decoder.conv2, last)
    channels = 2
    for stride, down, up in zip(strides[:-1], encoder.block, reversed(decoder.block), strict=False):
        _set(down.conv1, _fold(stride, channels))
        _set(up.conv_t1, _fold(stride, channels))
        channels *= stride
    stride, inner = strides[-1], hop // strides[-1]
    limits = edges(config.sampling_rate, hop, low, latents - low - 1)
    for block in encoder.block:
        for unit in (block.res_unit1, block.res_unit2, block.res_unit3):
            _silence(unit)
    _hear(encoder.block[-1].res_unit1, limits, torch.tensor(loudness), inner, config.sampling_rate, channels)
    window = torch.sin(math.pi * (torch.arange(2 * stride) + 0.5) / (2 * stride)).square() / stride
    analysis = torch.zeros(latents, channels + latents - low, 2 * stride)
    analysis[:low, :channels] = _lapped(basis(hop, low).T, inner, stride)
    for code in range(latents - low):
        analysis[low + code, channels + code] = window
    bursts = _bursts(limits, 2 * hop, config.sampling_rate) * torch.tensor(loudness)[:, None] * GAIN * NOISE
    _set(encoder.block[-1].conv1, analysis)
    _set(decoder.block[0].conv_t1, _lapped(torch.cat([basis(hop, low).T, bursts]), inner, stride))
    around, copy = torch.zeros(latents, latents, 3), torch.zeros(latents, latents, 7)
    around[:, :, 1], copy[:, :, 3] = torch.eye(latents), torch.eye(latents)
    _set(encoder.conv2, around)
    _set(decoder.conv1, copy)
