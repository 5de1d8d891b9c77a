"""An adapter as numbers: the factors of every adapted weight, whoever wrote them, and what they add to it.

`Weights` holds them as PEFT does, under diffusers' module names, in float32. The scale of LoRA, LoKr and LoHa is folded
into a factor, so that alpha = rank everywhere and no consumer can apply another one.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from peft import PeftConfig, PeftType, inject_adapter_in_model, set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lokr.layer import factorization
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from acestep_lora.adapters import AdapterError
from acestep_lora.naming import ATTENTION, MLP, to_diffusers, to_upstream

BaseWeight = Callable[[str], Tensor]
"""diffusers module name -> the frozen weight [out, in]."""
Factors = dict[str, Tensor]

MAGNITUDE = "lora_magnitude_vector"
FOLDED = {
    "LOKR": ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"),
    "LOHA": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    "LORA": ("lora_B.weight", "lora_A.weight", MAGNITUDE),
}
"""Factors of the kinds whose scale is folded, into the first one. Other kinds stay as PEFT has them."""
SYNONYMS = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight", "dora_scale": MAGNITUDE}
"""LyCORIS's names -> PEFT's."""


class Inexpressible(AdapterError):
    """The format has no exact form for this adapter."""


@dataclass(frozen=True)
class Weights:
    """kind: PEFT's name. modules: diffusers module -> its factors. metadata: what the adapter says about itself.

    settings: the PEFT config of a kind that is not folded; of the others, shapes tell everything.
    """

    kind: str
    modules: dict[str, Factors]
    settings: dict[str, object]
    metadata: dict[str, str]

    @property
    def decomposed(self) -> bool:
        """A DoRA: the length of each row of the merged weight is trained apart from its direction."""
        return any(MAGNITUDE in factors for factors in self.modules.values())


def product(factors: Factors, name: str) -> Tensor:
    """A matrix that is stored whole or as two factors."""
    return factors[name] if name in factors else factors[f"{name}_a"] @ factors[f"{name}_b"]


def change(factors: Factors) -> Tensor:
    """What a LoRA, LoKr or LoHa adds to the weight, before a DoRA's magnitude. [out, in]"""
    if "lora_A.weight" in factors:
        return factors["lora_B.weight"] @ factors["lora_A.weight"]
    if "hada_w1_a" in factors:
        return product(factors, "hada_w1") * product(factors, "hada_w2")
    return torch.kron(product(factors, "lokr_w1"), product(factors, "lokr_w2"))


def rank(factors: Factors) -> int:
    """Of a LoRA, LoKr or LoHa; for whole LoKr factors the smallest rank at which PEFT and LyCORIS keep them whole."""
    lefts = [name for name in ("lora_B.weight", "lokr_w2_a", "lokr_w1_a", "hada_w1_a") if name in factors]
    return factors[lefts[0]].shape[1] if lefts else math.ceil(max(factors["lokr_w2"].shape) / 2)


# ---------------------------------------------------------------- any consumer's state dict -> Weights

_NAMES = [f"{block}_attn.{name}" for block in ("self", "cross") for name in ATTENTION] + [f"mlp.{name}" for name in MLP]
_NAMES += [f"time_embed{r}.{name}" for r in ("", "_r") for name in ("linear_1", "linear_2", "time_proj")]
_NAMES += ["condition_embedder", "proj_in.1", "proj_out.1"]
_MODULES = {alias.replace(".", "_"): to_diffusers(name) for name in _NAMES for alias in (name, to_diffusers(name))}
_KEY = re.compile(
    r"(?:base_model\.model\.|transformer\.|lycoris_|lora_unet_)?(?:diffusion_model\.)?(?:decoder[._])?"
    rf"(layers[._][0-9]+[._])?({'|'.join(_MODULES).replace('_', '[._]')})\.(.+)"
)


def split(key: str) -> tuple[str, str]:
    """-> (diffusers module, PEFT factor) of a key in any consumer's form, dotted or flattened."""
    match = _KEY.fullmatch(key)
    if match is None:
        raise AdapterError(f"{key!r} does not belong to a layer of ACE-Step 1.5's decoder.")
    layer, name, factor = match.groups(default="")
    return layer.replace("_", ".") + _MODULES[name.replace(".", "_")], SYNONYMS.get(factor, factor)


def parse(tensors: Mapping[str, Tensor], config: Mapping | None, metadata: Mapping[str, str]) -> Weights:
    """Read a state dict of any consumer; AdapterError names the module or field that is not understood.

    Args:
        tensors: keys in upstream's or diffusers' names, dotted or flattened, under any consumer's prefix.
        config: fields of the PEFT config; None where there is none, then `.alpha` gives the scale, as in LyCORIS.
    """
    modules: dict[str, Factors] = {}
    for key, tensor in tensors.items():
        module, factor = split(key)
        modules.setdefault(module, {})[factor] = tensor.detach().cpu().float()
    if config is None:
        present = {factor for factors in modules.values() for factor in factors}
        settings = {"peft_type": next((kind for kind, known in FOLDED.items() if present & set(known)), "LORA")}
        # upstream's trainer also writes the modules it froze, as zeros
        modules = {name: f for name, f in modules.items() if all(tensor.any() for tensor in f.values())} or modules
    else:
        settings = _settings(config)
    kind = settings["peft_type"]
    if kind in FOLDED:
        modules, settings = {name: _folded(kind, name, f, settings) for name, f in modules.items()}, {}
    if not modules:
        raise AdapterError("It holds no weights.")
    for module, factors in modules.items():
        if not all(tensor.isfinite().all() for tensor in factors.values()):
            raise AdapterError(f"{to_upstream(module)} holds NaN or infinite numbers.")
    return Weights(kind, modules, settings, dict(metadata))


_IDLE = set(
    "peft_type peft_version task_type auto_mapping base_model_name_or_path revision inference_mode target_modules "
    "exclude_modules layers_to_transform layers_pattern lora_dropout rank_dropout module_dropout rank_dropout_scale "
    "init_weights use_dora decompose_both decompose_factor".split()
)
"""Fields of a PEFT config that names and shapes tell, or that matter in training only."""
_SCALE = {"r", "lora_alpha", "alpha", "use_rslora"}


def _settings(config: Mapping) -> dict:
    """PEFT's defaults with what `config` says otherwise; refuses what the factors do not hold."""
    kind = PeftType(config.get("peft_type") or ("LORA" if "lora_alpha" in config else "LOKR")).value
    settings = PEFT_TYPE_TO_CONFIG_MAPPING[kind](target_modules=["layer"]).to_dict() | {"peft_type": kind}
    for name, value in config.items():
        if name in _IDLE or (value or None) == (settings.get(name) or None):
            continue
        if name in ("rank_pattern", "alpha_pattern"):  # PEFT takes the keys for regular expressions, which can hang
            fits = all(re.fullmatch(r"\^?[\w.]+", key) for key in value)
            value = {to_diffusers(key): number for key, number in value.items()}
        elif name == "init_lora_weights":  # others may move part of the base weight into the adapter
            fits = value in (False, "gaussian", "orthogonal")
        else:
            known = _SCALE if kind in FOLDED else settings.keys()
            fits = name in known and isinstance(value, bool | int | float | str | None)
        if not fits:
            raise AdapterError(f"{name}={value!r:.80} in its PEFT config is not supported.")
        settings[name] = value
    return settings


def _folded(kind: str, module: str, factors: Factors, settings: Mapping) -> Factors:
    """With alpha = rank, and LoKr's first factor whole: it is small, and so all consumers read it alike."""
    alpha = factors.pop("alpha", None)
    _check(kind, module, factors)
    whole = {"lokr_w1", "lokr_w2"} <= factors.keys()
    if "r" in settings:
        r = _setting(settings, "r", "rank_pattern", module) if whole else rank(factors)
        alpha = _setting(settings, "lora_alpha" if kind == "LORA" else "alpha", "alpha_pattern", module)
        scale = alpha / (math.sqrt(r) if settings.get("use_rslora") else r)
    else:  # as LyCORIS and ComfyUI read it
        scale = 1.0 if alpha is None or whole else float(alpha) / rank(factors)
    if kind == "LOKR":
        second = {name: tensor for name, tensor in factors.items() if not name.startswith("lokr_w1")}
        factors = {"lokr_w1": product(factors, "lokr_w1"), **second}
    if MAGNITUDE in factors:
        factors[MAGNITUDE] = factors[MAGNITUDE].flatten()
    first = FOLDED[kind][0]
    return factors | {first: factors[first] * scale}


def _setting(settings: Mapping, name: str, pattern: str, module: str) -> float:
    return settings[pattern].get(get_pattern_key(settings[pattern], module), settings[name])


def _check(kind: str, module: str, factors: Factors) -> None:
    try:
        rows, columns = change({name: tensor.to("meta") for name, tensor in factors.items()}).shape
        fits = factors.keys() <= set(FOLDED[kind])
        fits &= all(tensor.numel() and tensor.ndim == 2 for name, tensor in factors.items() if name != MAGNITUDE)
        fits &= MAGNITUDE not in factors or list(factors[MAGNITUDE].shape) in ([rows], [rows, 1])
        fits &= rows * columns < 2**28  # four times the largest weight of the largest model
    except (KeyError, ValueError, RuntimeError):
        fits = False
    if not fits:
        shapes = {name: list(tensor.shape) for name, tensor in factors.items()}
        raise AdapterError(f"{to_upstream(module)}: these are not the factors of a {kind}: {shapes}.")


# ---------------------------------------------------------------- Weights -> PEFT


def peft_state(weights: Weights, prefix: str = "", rename: Callable[[str], str] = str) -> dict[str, Tensor]:
    return {
        f"{prefix}{rename(module)}.{factor}": tensor.contiguous()
        for module, factors in weights.modules.items()
        for factor, tensor in factors.items()
    }


def peft_settings(weights: Weights, rename: Callable[[str], str] = str) -> dict:
    """Arguments of the PEFT config that goes with `peft_state(weights, rename=rename)`."""
    settings = {**weights.settings, "target_modules": sorted(map(rename, weights.modules))}
    if weights.kind not in FOLDED:
        patterns = [(name, value) for name, value in settings.items() if isinstance(value, dict)]
        return settings | {name: {rename(module): r for module, r in value.items()} for name, value in patterns}
    ranks = {rename(module): rank(factors) for module, factors in weights.modules.items()}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    pattern = {module: r for module, r in ranks.items() if r != usual}
    alpha = "lora_alpha" if weights.kind == "LORA" else "alpha"
    settings |= {"r": usual, alpha: usual, "rank_pattern": pattern, "alpha_pattern": dict(pattern)}
    if weights.kind == "LORA":
        settings["use_dora"] = weights.decomposed
    if weights.kind == "LOKR":
        settings["decompose_factor"] = lokr_factor(weights)
    return settings


def peft_config(weights: Weights) -> PeftConfig:
    return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(weights.kind)](**peft_settings(weights))


def lokr_sides(weights: Weights) -> set[tuple[int, int]]:
    """(side of the first factor, side of the second) of every dimension a LoKr adapts."""
    shapes = [(f["lokr_w1"].shape, product(f, "lokr_w2").shape) for f in weights.modules.values()]
    return {pair for first, second in shapes for pair in zip(first, second, strict=True)}


def lokr_factor(weights: Weights) -> int:
    """The decompose_factor at which PEFT gives a LoKr's every module its shapes."""
    sides = lokr_sides(weights)
    for factor in (-1, max(first for first, _ in sides)):
        if all(factorization(first * second, factor) == (first, second) for first, second in sides):
            return factor
    raise Inexpressible("PEFT cannot express this LoKr: no decompose_factor gives the shapes of its factors.")


# ---------------------------------------------------------------- what an adapter adds


@torch.no_grad()
def delta(weights: Weights, module: str, base: BaseWeight) -> Tensor:
    """What the adapter adds to one weight in all, float64 [out, in]; only of a LoRA, LoKr or LoHa without the base."""
    factors = weights.modules[module]
    if weights.kind in FOLDED and MAGNITUDE not in factors:
        return change({name: tensor.double() for name, tensor in factors.items()})
    weight = base(module).detach().cpu().double()
    alone = replace(weights, modules={"layer": factors})
    shell = nn.ModuleDict({"layer": nn.Linear(*weight.T.shape, bias=False)}).eval()
    inject_adapter_in_model(peft_config(alone), shell)
    set_peft_model_state_dict(shell, peft_state(alone))
    shell.double()["layer"].get_base_layer().weight.copy_(weight)
    identity = torch.eye(weight.shape[1], dtype=torch.float64)
    return shell["layer"](identity).T - weight


def for_base_norm(weights: Weights, base: BaseWeight) -> Weights:
    """A DoRA for readers that divide its magnitude by the norm of the base weight instead of the merged one."""
    modules = {}
    for module, factors in weights.modules.items():
        weight = base(module).detach().cpu().double()
        ratio = weight.norm(dim=1) / (weight + change(factors)).norm(dim=1)
        modules[module] = factors | {MAGNITUDE: (factors[MAGNITUDE] * ratio).float()}
    return replace(weights, modules=modules)
