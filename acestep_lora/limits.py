"""What the numbers of a configuration may be, said before anything is loaded. Names and files are told where used."""

import math
from numbers import Real

from omegaconf import DictConfig, ListConfig, OmegaConf

from acestep_lora.errors import UserError

_ANY = (-math.inf, math.inf)
_POSITIVE, _SHARE = (1e-9, math.inf), (0, 1)
_SECONDS = (_POSITIVE[0], 600)  # the silence latent's
_FROM_0, _FROM_1 = (0, math.inf), (1, math.inf)

WHOLE = {
    "seed": (0, 2**32 - 1),
    "dataset.batch_size": _FROM_1,
    "dataset.num_workers": _FROM_0,
    "hardware.num_nodes": _FROM_1,
    "trainer.max_epochs": (-1, math.inf),
    "trainer.max_steps": (-1, math.inf),
    "trainer.accumulate_grad_batches": _FROM_1,
    "trainer.log_every_n_steps": _FROM_0,
    "trainer.check_val_every_n_epoch": _FROM_0,
    "scheduler.warmup_steps": _FROM_0,
    "save_every_n_epochs": _FROM_0,
    "save_every_n_steps": _FROM_0,
    "keep_last": _FROM_1,
    "keep_best": _FROM_0,
    "early_stopping.patience": _FROM_1,
    "previews.every_n_epochs": _FROM_0,
    "module.max_skipped": _FROM_1,
    "adapter.r": (1, 4096),  # of the widest layer of any released model
    "model.steps": _FROM_1,
    "conditioning.text_tokens": _FROM_1,
    "conditioning.lyric_tokens": _FROM_1,
    "n": _FROM_1,
    "steps": _FROM_1,
    "clips": _FROM_0,
    "repeats": _FROM_1,
    "top_k": _FROM_1,
    "rank_step": _FROM_1,
    "rank_max": _FROM_1,
    "port": (0, 65535),
}
REAL = {
    "dataset.crop_seconds": _POSITIVE,
    "dataset.max_duration": _POSITIVE,
    "dataset.val_fraction": _SHARE,
    "dataset.condition_dropout": _SHARE,
    "dataset.genre_ratio": (0, 100),
    "conditioning.lm_hints": _SHARE,
    "trainer.gradient_clip_val": _FROM_0,
    "optimizer.lr": _FROM_0,
    "adapter.alpha": _ANY,
    "adapter.dropout": _SHARE,
    "adapter.scale": _ANY,
    "ema.decay": _SHARE,
    "early_stopping.min_delta": _ANY,
    "early_stopping.target_loss": _ANY,
    "preservation.weight": _FROM_0,
    "previews.duration": _SECONDS,
    "previews.share": _SHARE,
    "module.spike": _POSITIVE,
    "model.shift": _POSITIVE,
    "model.guidance_scale": _FROM_0,
    "hardware.vram_gb": _POSITIVE,
    "duration": _SECONDS,
    "shift": _POSITIVE,
    "guidance_scale": _FROM_0,
}
SEVERAL = {"adapter.scale"}
"""Which may be lists."""


def check(cfg: DictConfig) -> None:
    """Raise UserError for a number that is none or out of its range; null is for whoever takes it to refuse."""
    for limits, kind, name in ((WHOLE, int, "a whole number"), (REAL, Real, "a number")):
        for key, (low, high) in limits.items():
            value = OmegaConf.select(cfg, key)
            if value is None:
                continue
            for each in value if isinstance(value, ListConfig) and key in SEVERAL else [value]:
                number = isinstance(each, kind) and not isinstance(each, bool) and math.isfinite(each)
                if not number or not low <= each <= high:
                    raise UserError(f"{key} must be {name}{_told(low, high)}, got {each}.")


def _told(low: float, high: float) -> str:
    if low == _POSITIVE[0]:
        return " above 0" + (f", at most {high}" if high < math.inf else "")
    if high < math.inf:
        return f" from {low} to {high}"
    return f" of at least {low}" if low > -math.inf else ""
