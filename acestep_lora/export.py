"""Adapters written to disk: a folder that the official app, PEFT, diffusers and ComfyUI load, or one format of it.

python -m acestep_lora.export adapter.path=runs/mine/adapter format=comfyui output=exported
python -m acestep_lora.export inspect adapter.path=runs/mine        (and merge, resize, extract, push)
"""

import functools
import json
import logging
import re
import sys
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import peft
import safetensors.torch
import torch
from omegaconf import DictConfig, ListConfig
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from acestep_lora import basemodel, factors, lowrank
from acestep_lora.adapter_files import DIFFUSERS_FILE, LOKR_FILE, PEFT_FILE, check_fit, find, read
from acestep_lora.adapters import AdapterError
from acestep_lora.dit import load_dit
from acestep_lora.factors import BaseWeight, Inexpressible, Weights, peft_settings, peft_state
from acestep_lora.filenames import legal
from acestep_lora.hashes import write_atomic
from acestep_lora.lowrank import Limits
from acestep_lora.naming import to_upstream

log = logging.getLogger(__name__)

Files = dict[str, bytes]
DTYPES = {"float32": 4, "float16": 2, "bfloat16": 2}
"""Bytes of a number."""


@dataclass(frozen=True)
class Options:
    """How to write an adapter.

    Args:
        name: of the ComfyUI file.
        base: the base model's weights; DoRA and OFT need them outside PEFT.
        comfyui_dora: "lora" writes a DoRA for ComfyUI as the nearest LoRA, which every version reads alike; "base_norm"
            and "merged_norm" as a DoRA, for a version that divides by that norm (ComfyUI's PR 15458 changes it).
        approximate: "svd" writes the nearest LoRA where a format cannot express the adapter; None refuses.
        limits: of such a LoRA.
        dtype: float32, float16 or bfloat16, of the numbers in the files.
    """

    name: str
    base: BaseWeight
    comfyui_dora: str = "lora"
    approximate: str | None = None
    limits: Limits = field(default_factory=Limits)
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.comfyui_dora not in ("lora", "base_norm", "merged_norm"):
            raise AdapterError(f"comfyui_dora must be lora, base_norm or merged_norm, got {self.comfyui_dora}.")
        if self.approximate not in (None, "svd"):
            raise AdapterError(f"approximate must be svd or null, got {self.approximate}.")
        if self.dtype not in DTYPES:
            raise AdapterError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype}.")

    def file(self, suffix: str) -> str:
        name = re.sub(r"[^\w.-]+", "_", self.name).strip("._")
        return f"{legal(name or 'adapter')}_{suffix}.safetensors"

    def nearest_lora(self, weights: Weights) -> Weights:
        lora = lowrank.nearest_lora(weights, self.base, self.limits)
        log.info("as a LoRA: rank %s, relative error %s", lora.metadata["svd_rank"], lora.metadata["svd_error"])
        return lora


# ---------------------------------------------------------------- one format


def _safetensors(state: dict[str, Tensor], header: dict[str, str], dtype: str) -> bytes:
    """A safetensors file with its header in a fixed order, so that the same adapter gives the same bytes."""
    data = safetensors.torch.save({key: tensor.to(getattr(torch, dtype)) for key, tensor in state.items()}, header)
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
        PEFT_FILE: _safetensors(state, weights.metadata | {"format": "pt"}, options.dtype),
        "adapter_config.json": json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False).encode(),
    }


def _diffusers(weights: Weights, options: Options) -> Files:
    """In diffusers' names: upstream's are silently ignored there when no q_proj or k_proj is among them."""
    if weights.kind not in ("LORA", "LOKR"):
        raise Inexpressible(f"diffusers loads LoRA, DoRA and LoKr, not {weights.kind}.")
    settings = {f"transformer.{key}": value for key, value in peft_settings(weights).items()}
    header = weights.metadata | {"format": "pt", "lora_adapter_metadata": json.dumps(settings)}
    return {DIFFUSERS_FILE: _safetensors(peft_state(weights, "transformer."), header, options.dtype)}


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
        return {options.file("lycoris"): _safetensors(_flat_state(weights), header, options.dtype)}
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
    return {LOKR_FILE: _safetensors(state, header | {"lokr_config": json.dumps(config)}, options.dtype)}


def _comfyui(weights: Weights, options: Options) -> Files:
    header = {}
    if weights.decomposed and options.comfyui_dora == "lora":
        weights = options.nearest_lora(weights)
    elif weights.decomposed:
        header = {"comfyui_dora": options.comfyui_dora}
        if options.comfyui_dora == "base_norm":
            weights = factors.for_base_norm(weights, options.base)
    state = _flat_state(weights, dotted=weights.kind == "LORA")
    return {options.file("comfyui"): _safetensors(state, weights.metadata | header, options.dtype)}


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


def save_adapter(folder: Path, weights: Weights, options: Options, formats: Collection[str] = tuple(FORMATS)) -> Files:
    """Write an adapter for every consumer that can express it, and a README on how to load it in each -> what it wrote.

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
    files["README.md"] = "\n".join([*readme, ""]).encode()
    write(folder, files)
    return files


def write(folder: Path, files: Files) -> None:
    for name, data in files.items():
        write_atomic(folder / name, data)


# ---------------------------------------------------------------- the command


def _watch(modules: Iterable[str]) -> Iterable[str]:
    return track(list(modules), "singular values", console=Console(stderr=True), transient=True)


def _paths(cfg: DictConfig) -> list[str]:
    return list(cfg.adapter.path) if isinstance(cfg.adapter.path, ListConfig) else [cfg.adapter.path]


def _dit(path: str | None, variant: str) -> nn.Module:
    if not path:
        raise AdapterError("The weights of the base model are needed for it: give model.path.")
    return load_dit(basemodel.pick_variant(Path(path).expanduser(), variant))


def _base(cfg: DictConfig, adapters: dict[str, Weights]) -> BaseWeight:
    """Weights of model.path, which is read when the first is asked for, and must fit the adapters."""

    @functools.cache
    def dit() -> nn.Module:
        dit = _dit(cfg.model.path, cfg.model.variant)
        for path, weights in adapters.items():
            check_fit(weights, dit, path)
        return dit

    return lambda module: dit().get_submodule(module).weight


def _limits(cfg: DictConfig, modules: int = 0) -> Limits:
    parameters = None
    if cfg.size is not None:
        header = 400 * modules + 4096  # names and shapes of a module's tensors, and the metadata
        parameters = int((cfg.size * 1e6 - header) / DTYPES[cfg.dtype])
    return Limits(cfg.tolerance, cfg.max_rank, parameters)


def _options(cfg: DictConfig, base: BaseWeight, name: str) -> Options:
    chosen = {key: cfg[key] for key in ("comfyui_dora", "approximate", "dtype")}
    return Options(cfg.name or name, base, limits=_limits(cfg), **chosen)


def _save(cfg: DictConfig, weights: Weights, options: Options) -> None:
    """Write an adapter in the format asked for, and say which files that made."""
    folder = Path(cfg.output).expanduser()
    if cfg.format == "all":
        files = save_adapter(folder, weights, options)
    else:
        files = convert(weights, cfg.format, options)
        if (folder / LOKR_FILE).exists() and LOKR_FILE not in files:
            raise AdapterError(f"{folder} holds {LOKR_FILE}, which the official app would load first: change output.")
        write(folder, files)
    print(*(folder / file for file in files), sep="\n")


def _say(weights: Weights) -> None:
    said = weights.metadata
    kept = f", holds {float(said['svd_kept']):.2%} of the change" if "svd_kept" in said else ""
    outside = f", {float(said['extract_outside']):.2%} of it lay elsewhere" if "extract_outside" in said else ""
    print(
        f"{len(weights.modules)} modules, rank up to {max(map(factors.rank, weights.modules.values()))}{kept}{outside}"
    )


def convert_one(cfg: DictConfig) -> None:
    """One adapter to another format, or to a folder for every app."""
    (path,) = _paths(cfg)
    weights = read(path)
    _save(cfg, weights, _options(cfg, _base(cfg, {path: weights}), Path(path).stem))


def resize(cfg: DictConfig) -> None:
    """The nearest LoRA of a smaller rank, or of a size in MB that is spent where the adapter does most."""
    if cfg.max_rank is cfg.size is None and cfg.tolerance == 1e-6:
        raise AdapterError("How small is it to be? max_rank=16, size=20 (MB) or tolerance=0.1 says so.")
    (path,) = _paths(cfg)
    weights = read(path)
    base = _base(cfg, {path: weights})
    small = lowrank.nearest_lora(weights, base, _limits(cfg, len(weights.modules)), _watch(weights.modules))
    _say(small)
    _save(cfg, small, _options(cfg, base, Path(path).stem))


def merge(cfg: DictConfig) -> None:
    """Several adapters as one LoRA, each at its strength; made smaller where max_rank, size or tolerance say so."""
    paths = _paths(cfg)
    scales = list(cfg.adapter.scale) if isinstance(cfg.adapter.scale, ListConfig) else [cfg.adapter.scale] * len(paths)
    if len(scales) != len(paths):
        raise AdapterError(f"adapter.scale has {len(scales)} strengths for {len(paths)} adapters.")
    adapters = {path: read(path) for path in paths}
    bases = {weights.metadata.get("base_model_sha256", "") for weights in adapters.values()} - {""}
    if len(bases) > 1:
        log.warning("these were trained on different base models; what they do together may not be what each did alone")
    base = _base(cfg, adapters)
    summed = lowrank.merge(list(zip(adapters.values(), scales, strict=True)), base)
    merged = lowrank.nearest_lora(summed, base, _limits(cfg, len(summed.modules)), _watch(summed.modules))
    _say(merged)
    _save(cfg, merged, _options(cfg, base, "merged"))


def extract(cfg: DictConfig) -> None:
    """A LoRA of what sets a fine-tune (`tuned`) apart from the model it was made from (`model.path`)."""
    if not cfg.tuned or (cfg.max_rank is cfg.size is None):
        raise AdapterError("Give tuned=FOLDER, the fine-tuned model, and max_rank=64 or size=100 (MB).")
    before, after = (_dit(path, cfg.model.variant) for path in (cfg.model.path, cfg.tuned))
    if {n: p.shape for n, p in before.named_parameters()} != {n: p.shape for n, p in after.named_parameters()}:
        raise AdapterError(f"{cfg.tuned} has other shapes than {cfg.model.path}: it was made from another model.")
    weights = lowrank.extract(after, before, _limits(cfg, 11 * len(before.layers)), _watch)
    about = {"base_model": f"{cfg.model.repo}/{cfg.model.variant}"}
    about |= {key: str(cfg.model[key]) for key in ("steps", "shift", "guidance_scale")}
    weights = replace(weights, metadata=about | weights.metadata)
    _say(weights)
    _save(cfg, weights, _options(cfg, lambda module: before.get_submodule(module).weight, Path(cfg.tuned).stem))


def inspect(cfg: DictConfig) -> None:
    """Kind, ranks, where the change lies, and what the adapter says about itself."""
    (path,) = _paths(cfg)
    weights, file = read(path), find(Path(path).expanduser())
    console = Console(width=None if sys.stdout.isatty() else 120)
    count = sum(tensor.numel() for parts in weights.modules.values() for tensor in parts.values())
    kind = "DoRA" if weights.decomposed else weights.kind
    console.print(f"{file}: {file.stat().st_size / 1e6:.1f} MB, {kind}, {count:,} parameters", soft_wrap=True)
    table, shares = Table("module", "how many", "rank", "share of the change", "rank that holds 99 %"), {}
    foldable = weights.kind in factors.FOLDED and not weights.decomposed
    spectra = {m: lowrank.spectrum(weights, m, None) for m in _watch(weights.modules)} if foldable else {}
    squares = {module: float(found.s.square().sum()) for module, found in spectra.items()}
    whole = sum(squares.values())
    for module in weights.modules:
        shares.setdefault(to_upstream(module).split(".", 2)[-1], []).append(module)
    for name, modules in shares.items():
        ranks = sorted({factors.rank(weights.modules[m]) for m in modules}) if weights.kind in factors.FOLDED else []
        row = [name, str(len(modules)), "-".join(map(str, ranks[:1] + ranks[1:][-1:])), "", ""]
        if whole:
            row[3] = f"{sum(squares[module] for module in modules) / whole:.1%}"
            row[4] = str(max(spectra[module].rank_within(0.1) for module in modules))
        table.add_row(*row)
    console.print(table)
    if foldable and not whole:
        console.print("Every change is zero: this adapter does nothing.")
    if whole:
        console.print("by layer, first to last: " + _bars(squares))
    for key, text in sorted(weights.metadata.items()):
        console.print(f"{key.replace('_', ' ')}: {text}", markup=False, highlight=False, soft_wrap=True)


def _bars(squares: dict[str, float]) -> str:
    """A bar for each layer, as high as its share of the squared change."""
    layers: dict[int, float] = {}
    for module, square in squares.items():
        if module.startswith("layers."):
            number = int(module.split(".")[1])
            layers[number] = layers.get(number, 0.0) + square
    highest = max(layers.values(), default=1.0)
    return "".join("▁▂▃▄▅▆▇█"[min(7, int(8 * layers[number] / highest))] for number in sorted(layers))


def push(cfg: DictConfig) -> None:
    """Upload an adapter to the Hugging Face hub: of a folder what belongs to it, of a file that file alone."""
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    (path,) = _paths(cfg)
    read(path)  # what nobody could load is not published
    file = find(Path(path).expanduser())
    if not cfg.repo:
        raise AdapterError("Where to? repo=YOUR_NAME/my-style says so.")
    if get_token() is None:
        raise AdapterError("There are no credentials for the hub: hf auth login, or the variable HF_TOKEN.")
    whole = Path(path).expanduser().is_dir()
    files = ["*.safetensors", "adapter_config.json", "README.md"] if whole else [file.name]
    api = HfApi()
    try:
        api.create_repo(cfg.repo, private=cfg.private, exist_ok=True)
        url = api.upload_folder(
            repo_id=cfg.repo,
            folder_path=file.parent,
            allow_patterns=files,
            commit_message=f"Adapter {file.parent.name}",
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise AdapterError(f"{cfg.repo} could not be written: {str(error).splitlines()[0]}") from None
    print(url)


VERBS: dict[str, Callable[[DictConfig], None]] = {
    "convert": convert_one,
    "inspect": inspect,
    "merge": merge,
    "resize": resize,
    "extract": extract,
    "push": push,
}


def main(cfg: DictConfig) -> int:
    """Do what the first word of the command line says; without one, convert."""
    if cfg.verb not in VERBS:
        raise AdapterError(f"{cfg.verb} is none of {', '.join(VERBS)}.")
    VERBS[cfg.verb](cfg)
    return 0


if __name__ == "__main__":
    from acestep_lora import cli

    if len(sys.argv) > 1 and sys.argv[1].isalpha():
        sys.argv[1] = f"verb={sys.argv[1]}"
    cli.main("export", main)
