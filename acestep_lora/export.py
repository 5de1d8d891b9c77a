"""Adapters written to disk: a folder that the official app, PEFT, diffusers and ComfyUI load, or one format of it.

python -m acestep_lora.export adapter.path=runs/mine/adapter format=comfyui output=exported
"""

import functools
import json
import logging
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import peft
import safetensors.torch
from omegaconf import DictConfig
from peft import PeftConfig
from torch import Tensor, nn

from acestep_lora import basemodel
from acestep_lora.adapter_files import (
    DIFFUSERS_FILE,
    LOKR_FILE,
    PEFT_FILE,
    apply_adapter,
    load_adapter,
    read,
    read_metadata,
)
from acestep_lora.adapters import AdapterError
from acestep_lora.dit import load_dit
from acestep_lora.factors import (
    BaseNeeded,
    BaseWeight,
    Inexpressible,
    Weights,
    parse,
    peft_settings,
    peft_state,
    svd_lora,
)
from acestep_lora.formats import comfyui_state, lokr_weights, lycoris_state
from acestep_lora.hashes import write_atomic
from acestep_lora.naming import ATTENTION, MLP, to_upstream

__all__ = ["apply_adapter", "convert", "load_adapter", "read_metadata", "save_adapter"]

log = logging.getLogger(__name__)

Files = dict[str, bytes]


@dataclass(frozen=True)
class Options:
    """How to write an adapter.

    Args:
        name: of the ComfyUI file.
        base: the base model's weights; DoRA and OFT need them outside PEFT.
        comfyui_dora: a DoRA for ComfyUI as a plain "lora", which every version reads alike, or as a DoRA for a version
            that divides by the norm of the base weight ("base_norm") or of the merged weight ("merged_norm").
        approximate: "svd" writes the nearest LoRA where a format cannot express the adapter; None refuses.
        tolerance, max_rank: of such a LoRA, see factors.svd_lora.
        num_layers: of the decoder; lets adapter_config.json name targets by suffix.
    """

    name: str
    base: BaseWeight | None = None
    comfyui_dora: str = "lora"
    approximate: str | None = None
    tolerance: float = 1e-6
    max_rank: int | None = None
    num_layers: int | None = None

    def __post_init__(self) -> None:
        if self.comfyui_dora not in ("lora", "base_norm", "merged_norm"):
            raise AdapterError(f"comfyui_dora must be lora, base_norm or merged_norm, got {self.comfyui_dora}.")
        if self.approximate not in (None, "svd"):
            raise AdapterError(f"approximate must be svd or null, got {self.approximate}.")

    def file(self, suffix: str) -> str:
        safe = re.sub(r"[^\w.-]+", "_", self.name)[:60].strip("._")
        return f"{safe or 'adapter'}_{suffix}.safetensors"


# ---------------------------------------------------------------- one format


def _safetensors(state: dict[str, Tensor], header: dict[str, str]) -> bytes:
    """A safetensors file with its header in a fixed order, so that the same adapter gives the same bytes."""
    data = safetensors.torch.save(state, header)
    size = int.from_bytes(data[:8], "little")
    ordered = json.dumps(json.loads(data[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
    ordered += b" " * (-len(ordered) % 8)  # tensors stay aligned
    return len(ordered).to_bytes(8, "little") + ordered + data[8 + size :]


def _targets(modules: list[str], num_layers: int | None) -> list[str]:
    """Suffixes (`q_proj`) when in a decoder of `num_layers` they mean exactly `modules`, else the modules."""
    suffixes = {module.rpartition(".")[2] for module in modules}
    blocks = (("self_attn", ATTENTION), ("cross_attn", ATTENTION), ("mlp", MLP))
    names = [f"{block}.{name}" for block, names in blocks for name in names if name in suffixes]
    meant = {f"layers.{i}.{name}" for i in range(num_layers or 0) for name in names}
    return sorted(suffixes) if meant == set(modules) else modules


def _peft(weights: Weights, options: Options) -> Files:
    config = peft_settings(weights, to_upstream)
    config["target_modules"] = _targets(config["target_modules"], options.num_layers)
    config |= {"peft_type": weights.kind, "task_type": None, "inference_mode": True, "peft_version": peft.__version__}
    config["base_model_name_or_path"] = weights.metadata.get("base_model")
    state = peft_state(weights, "base_model.model.", to_upstream)
    return {
        PEFT_FILE: _safetensors(state, weights.metadata | {"format": "pt"}),
        "adapter_config.json": json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False).encode(),
    }


def _diffusers(weights: Weights, options: Options) -> Files:
    """In diffusers' names: upstream's are silently ignored there when no q_proj or k_proj is among them."""
    if weights.kind not in ("LORA", "LOKR"):
        raise Inexpressible(f"diffusers loads LoRA, DoRA and LoKr, not {weights.kind}.")
    settings = {f"transformer.{key}": value for key, value in peft_settings(weights).items()}
    header = weights.metadata | {"format": "pt", "lora_adapter_metadata": json.dumps(settings)}
    return {DIFFUSERS_FILE: _safetensors(peft_state(weights, "transformer."), header)}


def _lycoris(weights: Weights, options: Options) -> Files:
    header = weights.metadata | {"format": "lycoris", "algo": weights.kind.lower()}
    if weights.kind != "LOKR":
        return {options.file("lycoris"): _safetensors(lycoris_state(weights), header)}
    state, config = lokr_weights(weights)
    return {LOKR_FILE: _safetensors(state, header | {"lokr_config": json.dumps(config)})}


def _comfyui(weights: Weights, options: Options) -> Files:
    header = weights.metadata
    if weights.kind == "LORA" and weights.decomposed:
        if options.comfyui_dora == "lora":
            weights = _nearest_lora(weights, options)
            header = weights.metadata
        else:
            header = header | {"comfyui_dora": options.comfyui_dora}
    return {options.file("comfyui"): _safetensors(comfyui_state(weights, options.comfyui_dora, options.base), header)}


FORMATS: dict[str, Callable[[Weights, Options], Files]] = {
    "peft": _peft,
    "diffusers": _diffusers,
    "comfyui": _comfyui,
    "lycoris": _lycoris,
}


def _nearest_lora(weights: Weights, options: Options) -> Weights:
    lora = svd_lora(weights, options.base, options.tolerance, options.max_rank)
    kind, measured = "DoRA" if weights.kind == "LORA" else weights.kind, lora.metadata
    log.info("%s as a LoRA: rank %s, relative error %s", kind, measured["svd_rank"], measured["svd_error"])
    return lora


def convert(weights: Weights, format: str, options: Options) -> Files:
    """The files of one format, by name.

    Raises:
        Inexpressible: the format has no exact form for this adapter, and no approximation was asked for.
    """
    if format not in FORMATS:
        raise AdapterError(f"format must be one of {', '.join(FORMATS)}, got {format}.")
    try:
        return FORMATS[format](weights, options)
    except BaseNeeded:
        raise
    except Inexpressible as reason:
        if options.approximate is None:
            raise Inexpressible(f"{reason} approximate=svd writes the nearest LoRA instead.") from None
        return FORMATS[format](_nearest_lora(weights, options), options)


# ---------------------------------------------------------------- a folder for everyone


def save_adapter(
    folder: str | Path,
    state: Mapping[str, Tensor],
    config: PeftConfig,
    *,
    metadata: Mapping[str, object],
    formats: Collection[str] | None = None,
    **options,
) -> list[Path]:
    """Write an adapter for every consumer that can express it, and a README on how to load it in each.

    Args:
        state: PEFT's state dict in diffusers' module names.
        config: the PEFT config it was trained with.
        metadata: goes into the header of every file; base_model, trigger_tag, example_prompt, steps, shift and
            guidance_scale into the README too.
        formats: which of FORMATS to write; None for all.
        options: fields of Options, of which `name` is required.

    Returns:
        The files, each written atomically. A format that cannot express the adapter is left out with a warning.
    """
    chosen = Options(**options)
    metadata = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    weights = parse(state, config.to_dict(), metadata)
    files: Files = {}
    for format in FORMATS:
        if format == "lycoris" and weights.kind != "LOKR":
            continue  # the official app reads every other kind as PEFT
        if formats is not None and format not in formats:
            continue
        try:
            files |= convert(weights, format, chosen)
        except Inexpressible as reason:
            log.warning("no %s file: %s", format, reason)
    files["README.md"] = _readme(weights, chosen.name, files).encode()
    return _write(Path(folder), files)


def _write(folder: Path, files: Files) -> list[Path]:
    for name, data in files.items():
        write_atomic(folder / name, data)
    return [folder / name for name in files]


_USE = {
    PEFT_FILE: "official app and PEFT: load this folder",
    LOKR_FILE: "official app: load this folder, a LoKr is read from this file",
    DIFFUSERS_FILE: "diffusers: `pipeline.load_lora_weights(folder)`; a LoKr by "
    f'`pipeline.transformer.load_lora_adapter(folder, weight_name="{DIFFUSERS_FILE}")`',
    "_comfyui.safetensors": "ComfyUI: put it into `models/loras` and choose it in a LoRA loader",
}
_SAID = ("base_model", "trigger_tag", "example_prompt", "steps", "shift", "guidance_scale")


def _readme(weights: Weights, name: str, files: Files) -> str:
    lines = ["---", "library_name: peft", "tags: [ace-step, music, lora]", "---", "", f"# {name}", ""]
    lines += [f"{weights.kind} adapter for ACE-Step 1.5.", ""]
    lines += [f"- {key.replace('_', ' ')}: {weights.metadata[key]}" for key in _SAID if weights.metadata.get(key)]
    lines += ["", "| file | use |", "|---|---|"]
    lines += [f"| {file} | {use} |" for end, use in _USE.items() for file in files if file.endswith(end)]
    return "\n".join([*lines, ""])


# ---------------------------------------------------------------- command


def _base(model: DictConfig) -> BaseWeight | None:
    """Reads the transformer only when a weight is asked for."""
    if not model.path:
        return None

    @functools.cache
    def dit() -> nn.Module:
        return load_dit(basemodel.pick_variant(Path(model.path).expanduser(), model.variant))

    return lambda module: dit().get_submodule(module).weight


def main(cfg: DictConfig) -> int:
    """Convert one adapter to one format."""
    options = Options(
        name=cfg.name or Path(cfg.adapter.path).stem,
        base=_base(cfg.model),
        comfyui_dora=cfg.comfyui_dora,
        approximate=cfg.approximate,
        tolerance=cfg.tolerance,
        max_rank=cfg.max_rank,
    )
    files = convert(read(cfg.adapter.path), cfg.format, options)
    folder = Path(cfg.output).expanduser()
    if (folder / LOKR_FILE).exists() and LOKR_FILE not in files:
        raise AdapterError(f"{folder} holds {LOKR_FILE}, which the official app would load first: change output.")
    for file in _write(folder, files):
        print(file)
    return 0


if __name__ == "__main__":
    from acestep_lora import cli

    cli.main("export", main)
