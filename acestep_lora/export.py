"""Adapters written to disk: a folder that the official app, PEFT, diffusers and ComfyUI load, or one format of it.

python -m acestep_lora.export adapter.path=runs/mine/adapter format=comfyui output=exported
"""

import functools
import json
import logging
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path

import peft
import safetensors.torch
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from acestep_lora import basemodel, factors
from acestep_lora.adapter_files import DIFFUSERS_FILE, LOKR_FILE, PEFT_FILE, check_fit, read
from acestep_lora.adapters import AdapterError
from acestep_lora.dit import load_dit
from acestep_lora.factors import BaseWeight, Inexpressible, Weights, peft_settings, peft_state
from acestep_lora.hashes import write_atomic
from acestep_lora.naming import to_upstream

log = logging.getLogger(__name__)

Files = dict[str, bytes]


@dataclass(frozen=True)
class Options:
    """How to write an adapter.

    Args:
        name: of the ComfyUI file.
        base: the base model's weights; DoRA and OFT need them outside PEFT.
        comfyui_dora: "lora" writes a DoRA for ComfyUI as the nearest LoRA, which every version reads alike; "base_norm"
            and "merged_norm" as a DoRA, for a version that divides by that norm (ComfyUI's PR 15458 changes it).
        approximate: "svd" writes the nearest LoRA where a format cannot express the adapter; None refuses.
        tolerance, max_rank: of such a LoRA, see factors.nearest_lora.
    """

    name: str
    base: BaseWeight
    comfyui_dora: str = "lora"
    approximate: str | None = None
    tolerance: float = 1e-6
    max_rank: int | None = None

    def __post_init__(self) -> None:
        if self.comfyui_dora not in ("lora", "base_norm", "merged_norm"):
            raise AdapterError(f"comfyui_dora must be lora, base_norm or merged_norm, got {self.comfyui_dora}.")
        if self.approximate not in (None, "svd"):
            raise AdapterError(f"approximate must be svd or null, got {self.approximate}.")

    def file(self, suffix: str) -> str:
        safe = re.sub(r"[^\w.-]+", "_", self.name)[:60].strip("._")
        return f"{safe or 'adapter'}_{suffix}.safetensors"

    def nearest_lora(self, weights: Weights) -> Weights:
        lora = factors.nearest_lora(weights, self.base, self.tolerance, self.max_rank)
        log.info("as a LoRA: rank %s, relative error %s", lora.metadata["svd_rank"], lora.metadata["svd_error"])
        return lora


# ---------------------------------------------------------------- one format


def _safetensors(state: dict[str, Tensor], header: dict[str, str]) -> bytes:
    """A safetensors file with its header in a fixed order, so that the same adapter gives the same bytes."""
    data = safetensors.torch.save(state, header)
    size = int.from_bytes(data[:8], "little")
    ordered = json.dumps(json.loads(data[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
    ordered += b" " * (-len(ordered) % 8)  # tensors stay aligned
    return len(ordered).to_bytes(8, "little") + ordered + data[8 + size :]


def _peft(weights: Weights, options: Options) -> Files:
    config = peft_settings(weights, to_upstream)
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


def _flat_state(weights: Weights, dotted: bool = False) -> dict[str, Tensor]:
    """LyCORIS's factors with alpha = rank and dora_scale [out, 1], under its flat module names or ComfyUI's dotted."""
    if weights.kind not in factors.FOLDED:
        raise Inexpressible(f"LyCORIS and ComfyUI have no form that means the same as PEFT's {weights.kind}.")
    names, state = {name: synonym for synonym, name in factors.SYNONYMS.items()}, {}
    for module, parts in weights.modules.items():
        key = to_upstream(module)
        key = f"diffusion_model.decoder.{key}" if dotted else f"lycoris_{key.replace('.', '_')}"
        for part, tensor in parts.items():
            tensor = tensor[:, None] if part == factors.MAGNITUDE else tensor
            state[f"{key}.{names.get(part, part)}"] = tensor.contiguous()
        state[f"{key}.alpha"] = torch.tensor(float(factors.rank(parts)))
    return state


def _lycoris(weights: Weights, options: Options) -> Files:
    """A LoKr with the lokr_config that the official app rebuilds it from: one rank for all, `.alpha` is not read."""
    header = weights.metadata | {"format": "lycoris", "algo": weights.kind.lower()}
    if weights.kind != "LOKR":
        return {options.file("lycoris"): _safetensors(_flat_state(weights), header)}
    if any(first > second for first, second in factors.lokr_sides(weights)):
        raise Inexpressible("LyCORIS puts the smaller Kronecker factor first: train with a smaller adapter.factor.")
    modules = weights.modules
    rank = max(map(factors.rank, modules.values()))
    mixed = any(factors.rank(parts) < rank for parts in modules.values() if "lokr_w2_a" in parts)
    if mixed:
        modules = {m: {w: factors.product(parts, w) for w in ("lokr_w1", "lokr_w2")} for m, parts in modules.items()}
    flags = "decompose_both use_tucker use_scalar weight_decompose bypass_mode rs_lora unbalanced_factorization".split()
    config = dict.fromkeys(flags, False) | {"linear_dim": rank, "linear_alpha": rank, "full_matrix": mixed}
    config["factor"] = factors.lokr_factor(weights)
    config["target_modules"] = sorted({to_upstream(module).rpartition(".")[2] for module in modules})
    state = _flat_state(replace(weights, modules=modules))
    return {LOKR_FILE: _safetensors(state, header | {"lokr_config": json.dumps(config)})}


def _comfyui(weights: Weights, options: Options) -> Files:
    header = {}
    if weights.decomposed and options.comfyui_dora == "lora":
        weights = options.nearest_lora(weights)
    elif weights.decomposed:
        header = {"comfyui_dora": options.comfyui_dora}
        if options.comfyui_dora == "base_norm":
            weights = factors.for_base_norm(weights, options.base)
    state = _flat_state(weights, dotted=weights.kind == "LORA")
    return {options.file("comfyui"): _safetensors(state, weights.metadata | header)}


FORMATS: dict[str, Callable[[Weights, Options], Files]] = {
    "peft": _peft,
    "lycoris": _lycoris,
    "diffusers": _diffusers,
    "comfyui": _comfyui,
}


def convert(weights: Weights, format: str, options: Options) -> Files:
    """The files of one format, by name; Inexpressible where it has no exact form and no approximation is allowed."""
    if format not in FORMATS:
        raise AdapterError(f"format must be one of {', '.join(FORMATS)}, got {format}.")
    try:
        return FORMATS[format](weights, options)
    except Inexpressible as reason:
        if options.approximate is None:
            raise Inexpressible(f"{reason} approximate=svd writes the nearest LoRA instead.") from None
        return FORMATS[format](options.nearest_lora(weights), options)


# ---------------------------------------------------------------- a folder for everyone

_USE = {
    "peft": "official app and PEFT: load this folder",
    "lycoris": "official app: load this folder",
    "diffusers": "`pipeline.load_lora_weights(folder)`, or for a LoKr "
    f'`pipeline.transformer.load_lora_adapter(folder, weight_name="{DIFFUSERS_FILE}")`',
    "comfyui": "put it into ComfyUI's `models/loras` and choose it in a LoRA loader",
}
_SAID = ("base_model", "trigger_tag", "example_prompt", "steps", "shift", "guidance_scale")


def save_adapter(folder: Path, weights: Weights, options: Options, formats: Collection[str] = tuple(FORMATS)) -> None:
    """Write an adapter for every consumer that can express it, and a README on how to load it in each.

    Each file is written atomically. A format that cannot express the adapter is left out with a warning.
    """
    files: Files = {}
    readme = ["---", "library_name: peft", "tags: [ace-step, music, lora]", "---", "", f"# {options.name}", ""]
    readme += [f"{weights.kind} adapter for ACE-Step 1.5.", ""]
    readme += [f"- {key.replace('_', ' ')}: {weights.metadata[key]}" for key in _SAID if weights.metadata.get(key)]
    for format in formats:
        if format == "lycoris" and weights.kind != "LOKR":
            continue  # the official app reads every other kind as PEFT
        try:
            made = convert(weights, format, options)
        except AdapterError as reason:
            log.warning("no %s file: %s", format, reason)
            continue
        files |= made
        readme += ["", f"{', '.join(made)}: {_USE[format]}"]
    write(folder, files | {"README.md": "\n".join([*readme, ""]).encode()})


def write(folder: Path, files: Files) -> None:
    for name, data in files.items():
        write_atomic(folder / name, data)


def main(cfg: DictConfig) -> int:
    """Convert one adapter to one format."""
    weights, folder = read(cfg.adapter.path), Path(cfg.output).expanduser()

    @functools.cache
    def dit() -> nn.Module:  # read only when a weight is asked for
        if not cfg.model.path:
            raise AdapterError("The weights of the base model are needed for it: give model.path.")
        dit = load_dit(basemodel.pick_variant(Path(cfg.model.path).expanduser(), cfg.model.variant))
        check_fit(weights, dit, cfg.adapter.path)
        return dit

    name = cfg.name or Path(cfg.adapter.path).stem
    chosen = {key: cfg[key] for key in ("comfyui_dora", "approximate", "tolerance", "max_rank")}
    files = convert(weights, cfg.format, Options(name, lambda module: dit().get_submodule(module).weight, **chosen))
    if (folder / LOKR_FILE).exists() and LOKR_FILE not in files:
        raise AdapterError(f"{folder} holds {LOKR_FILE}, which the official app would load first: change output.")
    write(folder, files)
    print(*(folder / file for file in files), sep="\n")
    return 0


if __name__ == "__main__":
    from acestep_lora import cli

    cli.main("export", main)
