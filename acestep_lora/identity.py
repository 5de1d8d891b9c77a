"""What a training is, so that its checkpoint is not resumed into something else."""

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from acestep_lora.adapters import read_pattern
from acestep_lora.data.items import Song
from acestep_lora.errors import UserError
from acestep_lora.hashes import digest

_WHOLE = ("adapter", "optimizer", "scheduler", "timesteps", "conditioning")
_PARTS = {
    "dataset": "crop_seconds crop_lyrics genre_ratio val_fraction condition_dropout stratify",
    "trainer": "gradient_clip_val limit_train_batches",
    "ema": "decay",
    "preservation": "weight prompts",
    "model": "quantize",
}
_FREE = ("adapter.lr", "adapter.init_from", "adapter.name", "optimizer.fused")
"""What says nothing about a resumed run: starting points, names, and another way to the same numbers."""

_FIXED = ("base model", "adapter.", "optimizer.", "scheduler.", "model.")
"""What the tensors of a checkpoint were made for, or what it brings itself. Anything else may change, if asked to."""

_LOOSE = "dropout"
"""What the names of those end with that may change all the same."""

Identity = dict[str, object]


def of(cfg: DictConfig, base_hash: str, precision: str, processes: int = 1) -> Identity:
    """The settings that decide what is trained, by config key, with plain values; songs come later (`of_songs`)."""
    plain = OmegaConf.to_container(cfg, resolve=True)
    adapter = plain["adapter"]
    if isinstance(pattern := adapter.get("rank_pattern"), str):
        adapter["rank_pattern"] = read_pattern(pattern)
    nodes = {name: plain[name] for name in _WHOLE}
    nodes |= {name: {key: plain[name].get(key) for key in keys.split()} for name, keys in _PARTS.items()}
    flat = {f"{name}.{key}": value for name, node in nodes.items() for key, value in _flatten(node)}
    flat = {key: value for key, value in flat.items() if key not in _FREE}
    per_step = cfg.dataset.batch_size * cfg.trainer.accumulate_grad_batches * processes
    flat |= {"songs per step (batch_size x accumulate_grad_batches x devices)": per_step}
    return flat | {"base model": base_hash[:16], "seed": cfg.seed, "hardware.precision": precision}


def of_songs(songs: list[Song]) -> Identity:
    """Audio, words and repeats of every song."""

    def made_from(song: Song) -> str:
        return digest(song.entry.header["audio_key"], song.entry.header.get("text_key"), song.track.repeat)[:16]

    return {f"song {song.track.id}": made_from(song) for song in songs}


def _flatten(node, prefix: str = ""):
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from _flatten(value, f"{prefix}{key}.")
    else:
        yield prefix[:-1], node


def check(checkpoint: Path, before: Identity, now: Identity, allow_changes: bool) -> None:
    """Raise UserError where a checkpoint was made by another training than this one.

    allow_changes: resume all the same where its tensors still mean what they did.
    """
    changed = [key for key in before | now if before.get(key) != now.get(key)]
    fixed = [key for key in changed if key.startswith(_FIXED) and not key.endswith(_LOOSE)]
    if not changed or (allow_changes and not fixed):
        return
    kinds_first = sorted(fixed or changed, key=lambda key: not key.endswith("_target_"))
    told = "; ".join(_tell(key, before, now) for key in kinds_first[:3])
    more = f" and {len(kinds_first) - 3} more" if len(kinds_first) > 3 else ""
    advice = "allow_changes=true resumes all the same."
    if fixed:
        advice = f"start a new run, which adapter.init_from={checkpoint.parent / 'adapter'} can begin with."
    raise UserError(f"{checkpoint.parent} is of another training: {told}{more}. Give the same settings, or {advice}")


def _tell(key: str, before: Identity, now: Identity) -> str:
    if key.startswith("song "):
        return f"{key} is new" if key not in before else f"{key} is gone" if key not in now else f"{key} has changed"
    if key == "base model":
        return "the base model's weights differ"
    return f"{key} was {before.get(key)} and is {now.get(key)}"
