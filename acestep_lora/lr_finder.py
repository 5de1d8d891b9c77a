"""A learning rate to start from, by a range test: python -m acestep_lora.lr_finder [train.py's overrides]

Smith 2017 (arXiv:1506.01186): the rate rises from step to step until the loss diverges, and the rate where it fell
fastest is suggested. Every step takes the same songs, noise levels and noise: a step's own draws move the loss more
than any rate does. It is a command of its own, so no run has to be put back to where it was before.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import track as progress

from acestep_lora.data.items import Batch, collate
from acestep_lora.errors import UserError
from acestep_lora.hardware import Hardware
from acestep_lora.hashes import replacing, write_atomic
from acestep_lora.module import FlowModule

SONGS = 8
"""Songs of a step, at as many noise levels."""
RATES = np.geomspace(1e-6, 1e-1, 76)
"""Fifteen to a decade."""
DIVERGED = 1.5
"""Times the lowest loss so far at which the test ends."""


def range_test(module: FlowModule, batches: list[Batch], hardware: Hardware, clip: float | None) -> np.ndarray:
    """The loss before each step of rising rate [n], n <= len(RATES); the last one may have diverged."""
    optimizer, losses = module.make_optimizer(list(module.trainable().values())), []
    scaler = torch.amp.GradScaler(module.device.type, enabled=hardware.resolved_precision() == "16-mixed")
    items = sum(len(batch.t) for batch in batches)
    for rate in progress(RATES, "range test"):
        optimizer.zero_grad()
        losses.append(0.0)
        for batch in batches:
            with hardware.autocast(module.device):
                loss = module.objective(batch)[0].sum() / items
            scaler.scale(loss).backward()
            losses[-1] += loss.item()
        if not math.isfinite(losses[-1]) or losses[-1] > DIVERGED * min(losses):
            break
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(module.trainable().values(), clip or math.inf)
        for group in optimizer.param_groups:
            group["lr"] = rate
        scaler.step(optimizer)
        scaler.update()
    return np.array(losses)


def suggest(losses: np.ndarray) -> float:
    """The rate at which a range test's loss fell fastest per decade. Raises UserError for a loss that never fell."""
    falling = losses[: int(np.nanargmin(losses)) + 1]
    if len(falling) < 3:
        raise UserError("The loss did not fall at any learning rate: look at the songs and at adapter.init_from.")
    smooth = np.convolve(np.pad(falling, 2, "edge"), np.full(5, 0.2), "valid")
    return float(RATES[np.gradient(smooth, np.log(RATES[: len(smooth)])).argmin()])


def picture(path: Path, losses: np.ndarray, rate: float) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(RATES[: len(losses)], losses)
    axes.axvline(rate, color="0.6", linestyle="--")
    axes.set(
        xscale="log", xlabel="learning rate", ylabel="loss, always of the same draws", title=f"suggested: {rate:.1e}"
    )
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


def main(cfg: DictConfig) -> int:
    from hydra.utils import instantiate

    from acestep_lora import plan, runs, sensitivity

    if "prodigy" in cfg.optimizer._target_.lower():
        raise UserError("optimizer=prodigy finds its own step size: there is no rate to look for.")
    hardware, base = instantiate(cfg.hardware), runs.find_base(cfg.model)
    data = runs.encoded_songs(cfg, base, hardware, prior_prompts=runs.prior_prompts(cfg))
    module = plan.make_module(cfg, base, hardware, data.scan.tracks)
    module.load(torch.device(hardware.device))
    module.to(hardware.device)
    (draws,) = sensitivity.passes(data.train_set, 1, SONGS, cfg.dataset.batch_size)
    batches = [collate([data.train_set[draw] for draw in batch]).to(module.device) for batch in draws]
    losses = range_test(module, batches, hardware, cfg.trainer.gradient_clip_val)
    rate, folder = suggest(losses), Path(cfg.output_dir).expanduser()
    picture(folder / "lr_finder.png", losses, rate)
    found = {"suggested": rate, "rates": RATES[: len(losses)].tolist(), "losses": losses.tolist()}
    write_atomic(folder / "lr_finder.json", json.dumps(found, indent=1).encode())
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(f"suggested: optimizer.lr={rate:.1e} (configured: {cfg.optimizer.lr:.1e}), the curve is in {folder}")
    return 0


if __name__ == "__main__":
    from acestep_lora import cli

    cli.main("train", main)
