"""Adapters read from disk, whoever wrote them, and put onto a transformer. Files are untrusted; no pickle is opened."""

import json
import math
import re
import warnings
from pathlib import Path

import torch
from peft import PeftConfig, PeftType, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer, cast_adapter_dtype
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from acestep_lora.adapters import AdapterError
from acestep_lora.factors import Weights, parse, peft_config, peft_state
from acestep_lora.naming import to_diffusers, to_upstream

PEFT_FILE = "adapter_model.safetensors"
LOKR_FILE = "lokr_weights.safetensors"
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"

_TECHNICAL = {"format", "algo", "lokr_config", "lora_adapter_metadata", "comfyui_dora"}
_BEYOND_FACTORS = (
    "modules_to_save layer_replication trainable_token_indices target_parameters lora_bias use_qalora use_bdlora "
    "alora_invocation_tokens arrow_config kasa_config fan_in_fan_out"
).split()
_UNREADABLE = (OSError, SafetensorError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError)
_UNREADABLE += (RecursionError, re.error)
_MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def _number(value: object, where: str) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e6:
        raise AdapterError(f"{where} is {value!r}, not a number of a usual size.")
    return int(value) if value == math.floor(value) else value


def _settings(raw: object, origin: Path) -> dict:
    """The plain values and patterns of a PEFT config, over PEFT's defaults; everything else in it is left unread."""
    if not isinstance(raw, dict):
        raise AdapterError(f"{origin}: the adapter's config is not a JSON object.")
    kind = raw.get("peft_type") or ("LORA" if "lora_alpha" in raw else "LOKR")
    config = PEFT_TYPE_TO_CONFIG_MAPPING.get(kind)
    if config is None or "target_modules" not in config.__dataclass_fields__:
        raise AdapterError(f"{origin}: peft_type {kind} is not an adapter of single layers known to PEFT.")
    beyond = [name for name in _BEYOND_FACTORS if raw.get(name)]
    beyond += ["bias"] if raw.get("bias", "none") != "none" else []
    beyond += ["init_lora_weights"] if str(raw.get("init_lora_weights")).startswith(_MOVES_BASE) else []
    if beyond:
        raise AdapterError(f"{origin}: {beyond[0]}={raw[beyond[0]]} changes more than an adapter's factors hold.")
    settings = config(target_modules=[""]).to_dict()
    for name in settings.keys() & raw.keys() - {"peft_type", "peft_version", "inference_mode"}:
        value, where = raw[name], f"{origin}: {name}"
        if name in ("rank_pattern", "alpha_pattern") and isinstance(value, dict):
            settings[name] = {to_diffusers(key): _number(number, where) for key, number in value.items()}
        elif isinstance(settings[name], bool):
            settings[name] = value is True
        elif isinstance(settings[name], int | float):
            settings[name] = _number(value, where)
        elif isinstance(settings[name], str) and isinstance(value, str):
            settings[name] = value
    return settings


def _find(path: str | Path) -> Path:
    """The weight file meant by a file, by an adapter's folder, or by a run's folder, which holds adapter/."""
    path = Path(path).expanduser()
    if path.is_file():
        if path.suffix != ".safetensors":
            raise AdapterError(f"{path} is not a .safetensors file; other kinds can run code when opened.")
        return path
    if not path.is_dir():
        raise AdapterError(f"{path} does not exist: give adapter.path a folder or a .safetensors file.")
    for folder in (path, path / "adapter"):
        found = sorted(folder.glob("*.safetensors"))
        named = [folder / name for name in (PEFT_FILE, LOKR_FILE, DIFFUSERS_FILE) if folder / name in found]
        if named or len(found) == 1:
            return (named or found)[0]
    raise AdapterError(f"{path} holds no adapter: expected {PEFT_FILE}, {LOKR_FILE} or one .safetensors file.")


def _read(file: Path) -> Weights:
    with safe_open(file, framework="pt") as opened:
        header = opened.metadata() or {}
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}
    settings = None
    if file.name == PEFT_FILE:
        config = file.with_name("adapter_config.json")
        settings = _settings(json.loads(config.read_text(encoding="utf-8")), config)
    elif "lora_adapter_metadata" in header:
        named = json.loads(header["lora_adapter_metadata"])
        settings = _settings({key.removeprefix("transformer."): value for key, value in named.items()}, file)
    elif "lokr_config" in header:  # the official app takes alpha from there, whatever the tensors say
        alpha = _number(json.loads(header["lokr_config"])["linear_alpha"], f"{file}: linear_alpha")
        tensors |= {f"{key.partition('.')[0]}.alpha": torch.tensor(float(alpha)) for key in tensors}
    elif header.get("comfyui_dora") == "base_norm":
        raise AdapterError(f"{file} is a DoRA rewritten for ComfyUI (base_norm): give the adapter it was made from.")
    return parse(tensors, settings, {key: text for key, text in header.items() if key not in _TECHNICAL})


def read(path: str | Path) -> Weights:
    """An adapter of ours, PEFT's, LyCORIS's, ComfyUI's or diffusers', whichever `path` holds.

    Raises:
        AdapterError: what is wrong with the file, in one sentence.
    """
    file = _find(path)
    try:
        return _read(file)
    except AdapterError as error:
        raise AdapterError(f"{file}: {error}" if str(file) not in str(error) else str(error)) from None
    except _UNREADABLE as error:
        raise AdapterError(f"{file} cannot be read as an adapter ({type(error).__name__}: {error}).") from None


def read_metadata(path: str | Path) -> dict[str, str]:
    """What an adapter says about itself: base_model, trigger_tag, steps, ...; empty for adapters not made here."""
    return read(path).metadata


def load_adapter(path: str | Path) -> tuple[dict[str, Tensor], PeftConfig]:
    """PEFT's state dict in diffusers' module names, and the config to inject with.

    Of LoRA, LoKr and LoHa the scale is folded in and alpha = rank.

    Raises:
        AdapterError: the file is not an adapter of ACE-Step 1.5, or of a kind PEFT does not have.
    """
    weights = read(path)
    return peft_state(weights), peft_config(weights)


def apply_adapter(dit: nn.Module, path: str | Path, name: str = "default", scale: float = 1.0) -> set[str]:
    """Put an adapter onto a transformer, in float32, active beside those already there -> the modules it adapts.

    Args:
        scale: strength, multiplies the update; 1 for kinds that have none, such as OFT.

    Raises:
        AdapterError: the adapter cannot be read, or does not fit this model.
    """
    weights = read(path)
    absent = sorted(weights.modules.keys() - dict(dit.named_modules()).keys())
    if absent:
        raise AdapterError(f"{path} was trained on another model: there is no {to_upstream(absent[0])} here.")
    state = peft_state(weights)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several adapters are meant
        inject_adapter_in_model(peft_config(weights), dit, name)
    cast_adapter_dtype(dit, name)  # before the values are set: bf16 would round them
    _check_fit(state, get_peft_model_state_dict(dit, adapter_name=name, save_embedding_layers=False), path)
    set_peft_model_state_dict(dit, state, name)
    for layer in dit.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.set_adapter(list(dit.peft_config))  # PEFT leaves only the newest one active
    if scale != 1:
        _set_scale(dit, name, scale)
    return set(weights.modules)


def _check_fit(state: dict[str, Tensor], expected: dict[str, Tensor], path: str | Path) -> None:
    keys = sorted(state.keys() ^ expected.keys())
    keys += [key for key in state.keys() & expected.keys() if state[key].shape != expected[key].shape]
    if keys:
        there, here = (list(side[keys[0]].shape) if keys[0] in side else "missing" for side in (state, expected))
        raise AdapterError(f"{path} does not fit this model: {to_upstream(keys[0])} is {there} in it and {here} here.")


def _set_scale(dit: nn.Module, name: str, scale: float) -> None:
    layers = [layer for layer in dit.modules() if isinstance(layer, BaseTunerLayer) and hasattr(layer, "scaling")]
    if not any(name in layer.scaling for layer in layers):
        kind = PeftType(dit.peft_config[name].peft_type).value
        raise AdapterError(f"A {kind} adapter has no strength: adapter.scale must be 1, got {scale}.")
    for layer in layers:
        layer.set_scale(name, scale)  # leaves layers without this adapter alone
