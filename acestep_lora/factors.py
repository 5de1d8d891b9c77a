"""An adapter apart from any file: the factors of every adapted weight, and what they add to it.

Whoever wrote them, `Weights` holds PEFT's factors under diffusers' module names in float32. Of LoRA, LoKr and LoHa the
scale is folded into a factor, so that alpha = rank everywhere and no consumer can apply another one.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

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


class Inexpressible(AdapterError):
    """The format has no exact form for this adapter."""


class BaseNeeded(Inexpressible):
    """The format needs weights of the base model that were not given."""


FOLDED = {
    "LORA": ("lora_B.weight", "lora_A.weight", "lora_magnitude_vector"),
    "LOKR": ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "dora_scale"),
    "LOHA": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "dora_scale"),
}
"""Factors of the kinds whose scale is folded, into the first one present. Other kinds stay as PEFT has them."""

MAGNITUDES = {"lora_magnitude_vector", "dora_scale"}
SYNONYMS = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}


@dataclass(frozen=True)
class Weights:
    """kind: PEFT's name. modules: diffusers module -> factor -> tensor. ranks: module -> rank, of folded kinds only.

    options: fields of the PEFT config that shapes do not tell. metadata: what the adapter says about itself.
    """

    kind: str
    modules: dict[str, Factors]
    ranks: dict[str, int]
    options: dict[str, object] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def decomposed(self) -> bool:
        """Whether a magnitude per output row is trained apart from the direction (DoRA and its kin)."""
        return any(MAGNITUDES & factors.keys() for factors in self.modules.values())


# ---------------------------------------------------------------- any consumer's state dict -> Weights

_PREFIX = re.compile(r"(base_model\.model\.|transformer\.|lycoris_|lora_unet_)?(diffusion_model\.)?(decoder[._])?")
_LAYER = re.compile(r"layers[._](\d+)[._](self_attn|cross_attn|mlp)[._](.+)")
_PROJECTIONS = {name: to_diffusers(name) for name in (*ATTENTION, *MLP)}
_PROJECTIONS |= {name: name for name in _PROJECTIONS.values()} | {"to_out_0": "to_out.0"}
_TIME = [f"time_embed{r}.{part}" for r in ("", "_r") for part in ("linear_1", "linear_2", "time_proj")]
_OUTSIDE = {name: name for name in (*_TIME, "condition_embedder", "proj_in.1", "proj_out.1")}
_OUTSIDE |= {name.replace(".", "_"): name for name in _OUTSIDE}


def split(key: str) -> tuple[str, str]:
    """-> (diffusers module, PEFT factor) of a key in any consumer's form, dotted or flattened."""
    start = _PREFIX.match(key).end()
    for dot in (i for i, letter in enumerate(key) if letter == "." and i > start):
        name, factor = key[start:dot], SYNONYMS.get(key[dot + 1 :], key[dot + 1 :])
        if name in _OUTSIDE:
            return to_diffusers(_OUTSIDE[name]), factor
        if (layer := _LAYER.fullmatch(name)) and layer[3] in _PROJECTIONS:
            return f"layers.{layer[1]}.{layer[2]}.{_PROJECTIONS[layer[3]]}", factor
    raise AdapterError(f"{key} does not belong to a layer of ACE-Step 1.5's decoder.")


def _kind_of(modules: dict[str, Factors]) -> str:
    present = {factor for factors in modules.values() for factor in factors} - {"dora_scale"}
    kinds = [kind for kind, known in FOLDED.items() if present & set(known)]
    if len(kinds) != 1:
        raise AdapterError(f"Expected one kind of adapter, found {' and '.join(kinds) or 'no LoRA, LoKr or LoHa'}.")
    return kinds[0]


def product(factors: Factors, name: str) -> Tensor:
    """A matrix that is stored whole or as two factors."""
    return factors[name] if name in factors else factors[f"{name}_a"] @ factors[f"{name}_b"]


def change(factors: Factors) -> Tensor:
    """What a LoRA, LoKr or LoHa adds to the weight before any magnitude is applied. [out, in]"""
    if "lora_A.weight" in factors:
        return factors["lora_B.weight"] @ factors["lora_A.weight"]
    if "hada_w1_a" in factors:
        return product(factors, "hada_w1") * product(factors, "hada_w2")
    return torch.kron(product(factors, "lokr_w1"), product(factors, "lokr_w2"))


def _check(kind: str, module: str, factors: Factors) -> None:
    unknown = factors.keys() - set(FOLDED[kind])
    if unknown:
        raise AdapterError(f"{to_upstream(module)}: a {kind} adapter has no {min(unknown)}.")
    try:
        matrices = [tensor for name, tensor in factors.items() if name not in MAGNITUDES]
        if any(matrix.ndim != 2 or not matrix.numel() for matrix in matrices):
            raise ValueError
        rows = change({name: tensor.to("meta") for name, tensor in factors.items()}).shape[0]
        if any(factors[name].numel() != rows for name in MAGNITUDES & factors.keys()):
            raise ValueError
    except (KeyError, ValueError, RuntimeError):
        shapes = {name: list(tensor.shape) for name, tensor in factors.items()}
        raise AdapterError(f"{to_upstream(module)}: the adapter's factors do not fit each other: {shapes}.") from None


def _low_rank(factors: Factors) -> int | None:
    lefts = ("lora_B.weight", "lokr_w2_a", "lokr_w1_a", "hada_w1_a")
    return next((factors[name].shape[1] for name in lefts if name in factors), None)


def _setting(settings: Mapping, name: str, module: str) -> float:
    """A rank or alpha of one module; patterns may be written in either naming."""
    patterns = settings.get("rank_pattern" if name == "r" else "alpha_pattern") or {}
    keys = (get_pattern_key(patterns, alias) for alias in (module, to_upstream(module)))
    return next((patterns[key] for key in keys if key in patterns), settings[name])


def _scale(kind: str, module: str, rank: int | None, alpha: Tensor | None, settings: Mapping | None) -> float:
    """By PEFT's config where there is one, else by `.alpha` as LyCORIS and ComfyUI read it: absent means scale 1."""
    if settings is None:
        return 1.0 if alpha is None or rank is None else float(alpha) / rank
    rank = rank or _setting(settings, "r", module)
    alpha = _setting(settings, "lora_alpha" if kind == "LORA" else "alpha", module)
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def parse(
    tensors: Mapping[str, Tensor], settings: Mapping | None = None, metadata: Mapping[str, str] | None = None
) -> Weights:
    """Read a state dict of any consumer.

    Args:
        tensors: keys in upstream's or diffusers' names, dotted or flattened, under any consumer's prefix.
        settings: fields of the PEFT config; None where there is none, then `.alpha` tensors give the scale.

    Raises:
        AdapterError: naming the key or module that is not understood.
    """
    modules: dict[str, Factors] = {}
    for key, tensor in tensors.items():
        module, factor = split(key)
        modules.setdefault(module, {})[factor] = tensor.detach().cpu().float()
        if not modules[module][factor].isfinite().all():
            raise AdapterError(f"{key} holds NaN or infinite numbers.")
    kind = PeftType(settings["peft_type"]).value if settings else None
    if kind is None or kind in FOLDED:
        return _folded(modules, settings, dict(metadata or {}))
    technical = ("peft_type", "peft_version", "base_model_name_or_path", "inference_mode")
    kept = {key: value for key, value in settings.items() if key.endswith("_pattern") and value}
    kept |= {key: value for key, value in settings.items() if isinstance(value, bool | int | float | str)}
    options = {key: value for key, value in kept.items() if key not in technical}
    return Weights(kind, modules, {}, options, dict(metadata or {}))


def _folded(modules: dict[str, Factors], settings: Mapping | None, metadata: dict[str, str]) -> Weights:
    alphas = {module: factors.pop("alpha", None) for module, factors in modules.items()}
    kind, ranks = _kind_of(modules), {}
    if settings is None:  # upstream's trainer also writes the modules it froze, as zeros
        moved = {module: f for module, f in modules.items() if all(tensor.any() for tensor in f.values())}
        modules = moved or modules
    for module, factors in modules.items():
        if kind == "LORA" and "dora_scale" in factors:
            factors["lora_magnitude_vector"] = factors.pop("dora_scale").flatten()
        _check(kind, module, factors)
        rank = _low_rank(factors)
        scaled = next(name for name in FOLDED[kind] if name in factors)
        factors[scaled] = factors[scaled] * _scale(kind, module, rank, alphas[module], settings)
        if rank is None:  # both Kronecker factors whole: any rank at which PEFT and LyCORIS keep them so
            rank = max(int(_setting(settings or {"r": 1}, "r", module)), math.ceil(max(factors["lokr_w2"].shape) / 2))
        ranks[module] = rank
    options = {"decompose_factor": (settings or {}).get("decompose_factor", -1)} if kind == "LOKR" else {}
    return Weights(kind, modules, ranks, options, metadata)


# ---------------------------------------------------------------- Weights -> PEFT


def _same(name: str) -> str:
    return name


def decompose_factor(weights: Weights, order: Callable[[tuple[int, int]], tuple[int, int]]) -> int | None:
    """The factor that gives a LoKr's every module its shapes; `order` is how the consumer sorts a pair of sides."""
    pairs = set()
    for factors in weights.modules.values():
        pairs |= set(zip(product(factors, "lokr_w1").shape, product(factors, "lokr_w2").shape, strict=True))
    candidates = [weights.options["decompose_factor"], -1, *sorted({first for first, _ in pairs})]
    fits = (f for f in candidates if all(order(factorization(a * b, f)) == (a, b) for a, b in pairs))
    return next(fits, None)


def peft_state(weights: Weights, prefix: str = "", rename: Callable[[str], str] = _same) -> dict[str, Tensor]:
    return {
        f"{prefix}{rename(module)}.{factor}": tensor.contiguous()
        for module, factors in weights.modules.items()
        for factor, tensor in factors.items()
    }


def peft_settings(weights: Weights, rename: Callable[[str], str] = _same) -> dict:
    """Arguments of the PEFT config that goes with `peft_state(weights, rename=rename)`."""
    if any("dora_scale" in factors for factors in weights.modules.values()):
        raise Inexpressible(f"This {weights.kind} is weight-decomposed (dora_scale), which PEFT cannot express.")
    settings = {**weights.options, "target_modules": sorted(map(rename, weights.modules), key=_natural)}
    if weights.kind not in FOLDED:
        patterns = {key: value for key, value in settings.items() if key.endswith("_pattern")}
        return settings | {key: {rename(name): r for name, r in value.items()} for key, value in patterns.items()}
    rank = Counter(weights.ranks.values()).most_common(1)[0][0]
    pattern = {rename(module): r for module, r in weights.ranks.items() if r != rank}
    alpha = "lora_alpha" if weights.kind == "LORA" else "alpha"
    settings |= {"r": rank, alpha: rank, "rank_pattern": pattern, "alpha_pattern": dict(pattern)}
    if weights.kind == "LORA":
        settings["use_dora"] = weights.decomposed
    if weights.kind == "LOKR":
        settings["decompose_both"] = any("lokr_w1_a" in factors for factors in weights.modules.values())
        settings["decompose_factor"] = decompose_factor(weights, _same)
        if settings["decompose_factor"] is None:
            raise Inexpressible("PEFT cannot express this LoKr: no decompose_factor gives the shapes of its factors.")
    return settings


def _natural(module: str) -> list[str]:
    return [part.zfill(4) for part in module.split(".")]


def peft_config(weights: Weights) -> PeftConfig:
    return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(weights.kind)](**peft_settings(weights))


# ---------------------------------------------------------------- what an adapter adds, and the nearest plain LoRA


def base_weight(base: BaseWeight | None, module: str, shape: torch.Size | None = None) -> Tensor:
    """float64 [out, in]; raises BaseNeeded when there is none, or not one of `shape`."""
    if base is None:
        raise BaseNeeded("The weights of the base model are needed for it: give model.path.")
    weight = base(module).detach().cpu().double()
    if weight.shape != (shape or weight.shape):
        sizes = f"{list(weight.shape)}, the adapter is for {list(shape)}"
        raise BaseNeeded(f"The base weight of {to_upstream(module)} is {sizes}: give the model it was trained on.")
    return weight


def delta(weights: Weights, module: str, base: BaseWeight | None = None) -> Tensor:
    """What the adapter adds to one weight in all, float64 [out, in]; all but LoRA, LoKr and LoHa need that weight."""
    factors = {name: tensor.double() for name, tensor in weights.modules[module].items()}
    if weights.kind not in FOLDED:
        return _delta_through_peft(weights, module, base_weight(base, module))
    added = change(factors)
    for name in MAGNITUDES & factors.keys():
        weight = base_weight(base, module, added.shape)
        merged = weight + added
        return merged * (factors[name].reshape(-1, 1) / merged.norm(dim=1, keepdim=True)) - weight
    return added


@torch.no_grad()
def _delta_through_peft(weights: Weights, module: str, weight: Tensor) -> Tensor:
    """PEFT's own layer around the weight, read off by feeding it the identity."""
    alone = replace(weights, modules={"layer": weights.modules[module]})
    shell = nn.ModuleDict({"layer": nn.Linear(weight.shape[1], weight.shape[0], bias=False)}).eval()
    inject_adapter_in_model(peft_config(alone), shell)
    set_peft_model_state_dict(shell, peft_state(alone))
    shell.double()["layer"].get_base_layer().weight.copy_(weight)
    return shell["layer"](torch.eye(weight.shape[1], dtype=torch.float64)).T - weight


def svd_lora(
    weights: Weights, base: BaseWeight | None = None, tolerance: float = 1e-6, max_rank: int | None = None
) -> Weights:
    """The nearest plain LoRA, of the smallest rank whose error is within `tolerance` (relative, Frobenius, per module).

    metadata gets `svd_rank` and `svd_error`: the largest rank, and the largest error as measured on the result.
    """
    modules, errors = {}, []
    for module in weights.modules:
        target = delta(weights, module, base)
        u, s, v = torch.linalg.svd(target, full_matrices=False)
        left_out = s.square().flip(0).cumsum(0).flip(0).sqrt()  # by a LoRA of rank 0, 1, ...
        rank = min(max(1, int((left_out > tolerance * left_out[0]).sum())), max_rank or len(s))
        root = s[:rank].sqrt()
        up, down = (u[:, :rank] * root).float(), (root[:, None] * v[:rank]).float()
        modules[module] = {"lora_A.weight": down, "lora_B.weight": up}
        errors.append(float((up.double() @ down.double() - target).norm() / left_out[0].clamp_min(1e-300)))
    ranks = {module: len(factors["lora_A.weight"]) for module, factors in modules.items()}
    measured = {"svd_rank": str(max(ranks.values())), "svd_error": f"{max(errors):.1e}"}
    return Weights("LORA", modules, ranks, metadata=weights.metadata | measured)
