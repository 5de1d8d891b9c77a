"""Adapters read from disk, whoever wrote them, and put onto a transformer. Files are untrusted; no pickle is opened."""

import json
import warnings
from pathlib import Path

import torch
from peft import get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer, cast_adapter_dtype
from safetensors import safe_open
from torch import nn

from acestep_lora.adapters import AdapterError
from acestep_lora.factors import FOLDED, Weights, parse, peft_config, peft_state
from acestep_lora.hashes import damage, sealed
from acestep_lora.layers import ADDITIVE, exchange
from acestep_lora.naming import to_upstream
from acestep_lora.untrusted import read_object, told

PEFT_FILE = "adapter_model.safetensors"
LOKR_FILE = "lokr_weights.safetensors"
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"

_TECHNICAL = {"format", "algo", "lokr_config", "lora_adapter_metadata", "comfyui_dora"}


def _told(path: str | Path):
    return told(f"{path} cannot be used as an adapter", AdapterError)


def find(path: Path) -> Path:
    """The weight file meant by a file, by an adapter's folder, or by a run's folder, which holds adapter/."""
    if path.is_file():
        if path.suffix != ".safetensors":
            raise AdapterError("only .safetensors files are opened, other kinds can run code.")
        return path
    for folder in (path, path / "adapter"):
        found = sorted(folder.glob("*.safetensors"))
        named = [folder / name for name in (PEFT_FILE, LOKR_FILE, DIFFUSERS_FILE) if folder / name in found]
        if named or len(found) == 1:
            return (named or found)[0]
    raise AdapterError(f"there is no {PEFT_FILE}, {LOKR_FILE} or single .safetensors file.")


def read(path: str | Path) -> Weights:
    """An adapter of ours, PEFT's, LyCORIS's, ComfyUI's or diffusers', whichever `path` holds.

    Raises:
        AdapterError: what is wrong with the file, in one sentence.
    """
    config = None
    with _told(path):
        file = find(Path(path).expanduser())
        if sealed(file) and (reason := damage(file)):
            raise AdapterError(f"it is damaged ({reason}): give another checkpoint's.")
        with safe_open(file, framework="pt") as opened:
            header = opened.metadata() or {}
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}
        if file.name == PEFT_FILE:
            config = read_object(file.with_name("adapter_config.json"))
        elif "lora_adapter_metadata" in header:
            named = json.loads(header["lora_adapter_metadata"])
            config = {key.removeprefix("transformer."): value for key, value in named.items()}
        elif "lokr_config" in header:  # the official app takes alpha from there, whatever the tensors say
            alpha = torch.tensor(float(json.loads(header["lokr_config"])["linear_alpha"]))
            tensors |= {f"{key.partition('.')[0]}.alpha": alpha for key in tensors}
        elif header.get("comfyui_dora") == "base_norm":
            raise AdapterError("it is a DoRA rewritten for ComfyUI (base_norm): give the adapter it was made from.")
        return parse(tensors, config, {key: text for key, text in header.items() if key not in _TECHNICAL})


def check_fit(weights: Weights, dit: nn.Module, path: str | Path) -> None:
    """Raise AdapterError unless PEFT makes these very shapes for `dit`: tried where a hostile rank costs no memory."""
    with _told(path):
        with torch.device("meta"):
            skeleton = type(dit).from_config(dit.config)
        inject_adapter_in_model(peft_config(weights), skeleton, low_cpu_mem_usage=True)
        made = get_peft_model_state_dict(skeleton, adapter_name="default", save_embedding_layers=False)
        there, here = ({key: tuple(t.shape) for key, t in state.items()} for state in (peft_state(weights), made))
        for key, _ in sorted(there.items() ^ here.items()):
            shapes = f"{there.get(key, 'missing')} in it and {here.get(key, 'missing')} here"
            raise AdapterError(f"it was trained on another model than model.path: {to_upstream(key)} is {shapes}.")


def apply_adapter(dit: nn.Module, path: str | Path, name: str = "default", scale: float = 1.0) -> set[str]:
    """Put an adapter onto a transformer, in float32, active beside those already there -> the modules it adapts.

    What several do to a module adds up, each as it would change the base model alone.

    Args:
        scale: strength, multiplies the update; at 0 the transformer stays as it is. Kinds that have none, such as OFT,
            take 0 or 1, and no other adapter beside them.

    Raises:
        AdapterError: the adapter cannot be read, or does not fit this model.
    """
    weights = read(path)
    check_fit(weights, dit, path)
    if scale == 0:
        return set()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several adapters are meant
        inject_adapter_in_model(peft_config(weights), dit, name)
    several = len(dit.peft_config) > 1
    for other in dit.peft_config if several else ():
        if not has_scale(dit, other):
            raise AdapterError(
                f"An {_kind(dit, other)} adapter stands beside no other one: make one of them with "
                f"python -m acestep_lora.export merge adapter.path=[...] model.path=... output=merged"
            )
    cast_adapter_dtype(dit, name)  # before the values are set: bf16 would round them
    set_peft_model_state_dict(dit, peft_state(weights), name)
    if several or scale != 1:  # else PEFT's own layers say the same, with one product less
        set_scale(dit, scale, name)
    for layer in dit.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.set_adapter(list(dit.peft_config))  # PEFT leaves only the newest one active
    return set(weights.modules)


def _kind(dit: nn.Module, name: str) -> str:
    return dit.peft_config[name].peft_type.value


def has_scale(dit: nn.Module, name: str = "default") -> bool:
    """Whether the kind of an adapter on a transformer has a strength."""
    return _kind(dit, name) in FOLDED


def set_scale(dit: nn.Module, scale: float, name: str = "default") -> None:
    """Change the strength of an adapter on a transformer. Raises AdapterError for a kind that has none."""
    if not has_scale(dit, name):
        if scale != 1:
            raise AdapterError(f"An {_kind(dit, name)} adapter has no strength: adapter.scale must be 1, got {scale}.")
        return
    exchange(dit, ADDITIVE)
    for layer in dit.modules():
        if isinstance(layer, LoraLayer) and name in layer.lora_magnitude_vector:
            layer.lora_magnitude_vector[name].strength = scale
        elif isinstance(layer, BaseTunerLayer) and name in layer.scaling:
            layer.set_scale(name, scale)
