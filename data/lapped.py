"""A codec written into Oobleck's weights: low frequencies as they are, high ones as levels; a decoder to train.

Low: the modified discrete cosine transform (Princen, Johnson, Bradley 1987). Oobleck's strided convolutions can hand
every sample down unchanged (a stride of 4 puts four samples into four channels), and its last one, twice as long as its
stride, can then be any lapped transform of frames that overlap by half. The MDCT's lowest coefficients are latents, and
the decoder's way back is the inverse transform: exact for the sum of both channels.

High: each band is one latent, its level. In the encoder's last residual unit filters hear the band, Snake squares what
they hear (the linear part goes as every filter has its negative beside it), and the sum is the level. The decoder plays
a fixed burst of noise of the band at that level. The last latent is the balance: the level of left less that of right.

All other residual units of the encoder are silent; data/oobleck.py leaves such units out.
"""

import math

import numpy as np
import torch
from diffusers import AutoencoderOobleck
from torch import Tensor, nn

LINEAR = 4.0  # log of the factor by which Snake on the main path is weaker than by default
QUIET = 0.1  # how loud a residual unit is at first, against PyTorch's initialisation
HEARING = (1.0, 4.0)  # of the lowest and the highest band: how soon the squares of what filters hear level off
GAIN = 3.0  # music's RMS is about 0.1


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


def _filters(limits: np.ndarray, taps: int, rate: int, count: int) -> Tensor:
    """[bands, count, taps]: windowed tones across each band in quadrature, each followed by its negative."""
    t, window = (np.arange(taps) - (taps - 1) / 2) / rate, np.hanning(taps + 2)[1:-1]
    rows = []
    for start, end in zip(limits[:-1], limits[1:], strict=True):
        for i in range(count // 4):
            angle = 2 * np.pi * np.exp(np.interp((i + 0.5) * 4 / count, (0, 1), np.log((start, end)))) * t
            for tone in (np.cos(angle), np.sin(angle)):
                rows += [window * tone / (window**2).sum() ** 0.5, -window * tone / (window**2).sum() ** 0.5]
    return torch.from_numpy(np.array(rows, np.float32)).unflatten(0, (len(limits) - 1, count))


def _bursts(limits: np.ndarray, samples: int, rate: int) -> Tensor:
    """[bands, samples]: noise of each band, of unit RMS, under a sine window."""
    noise = np.fft.rfft(np.random.default_rng(0).standard_normal(samples))
    frequency, window = np.fft.rfftfreq(samples, 1 / rate), np.sin(np.pi * (np.arange(samples) + 0.5) / samples)
    bands = [
        np.fft.irfft(noise * ((frequency >= start) & (frequency < end)), samples)
        for start, end in zip(limits[:-1], limits[1:], strict=True)
    ]
    return torch.from_numpy(np.array([window * band / band.std() for band in bands], np.float32))


def _hear(unit: nn.Module, limits: np.ndarray, inner: int, rate: int, first: int) -> None:
    """Make a residual unit write the bands' levels, and the balance, into its channels from `first` on.

    inner: samples of a step; those of the middle are channels 0, 2, ... 2 * (inner - 1), those of the side between.
    """
    width, codes = unit.conv1.out_channels, len(limits)
    each = width // codes // 8 * 8
    levels = _filters(limits, 7 * inner, rate, each)
    balance = _filters(limits[[0, -1]], 7 * inner, rate, each // 2)[0]
    middle = torch.cat([levels.flatten(0, 1), balance, balance]).unflatten(1, (7, inner)).transpose(1, 2)
    side = torch.cat([torch.zeros(len(levels) * each, 7 * inner), balance, -balance])
    weight = torch.stack([middle, side.unflatten(1, (7, inner)).transpose(1, 2)], dim=2).flatten(1, 2)
    signs = torch.ones(codes, each)
    signs[-1, each // 2 :] = -1
    unit.snake1.beta.fill_(LINEAR)
    sharpness = torch.from_numpy(np.geomspace(*HEARING, codes - 1)).log().repeat_interleave(each)
    unit.snake2.alpha[0, : len(sharpness), 0] = sharpness.float()
    _set(unit.conv1, weight)
    out = torch.zeros(width, width)
    for code in range(codes):
        out[first + code, code * each : (code + 1) * each] = 4 / each * signs[code]
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
    _hear(encoder.block[-1].res_unit3, limits, inner, config.sampling_rate, channels)
    window = torch.sin(math.pi * (torch.arange(2 * stride) + 0.5) / (2 * stride)).square() / stride
    analysis = torch.zeros(latents, channels + latents - low, 2 * stride)
    analysis[:low, :channels] = _lapped(basis(hop, low).T, inner, stride)
    for code in range(latents - low):
        analysis[low + code, channels + code] = window
    bursts = _bursts(limits, 2 * hop, config.sampling_rate) * torch.tensor(loudness)[:, None] * GAIN
    _set(encoder.block[-1].conv1, analysis)
    _set(decoder.block[0].conv_t1, _lapped(torch.cat([basis(hop, low).T, bursts]), inner, stride))
    around, copy = torch.zeros(latents, latents, 3), torch.zeros(latents, latents, 7)
    around[:, :, 1], copy[:, :, 3] = torch.eye(latents), torch.eye(latents)
    _set(encoder.conv2, around)
    _set(decoder.conv1, copy)
