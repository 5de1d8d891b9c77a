"""Adapter formats beyond PEFT's: the state dicts LyCORIS and ComfyUI read."""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from acestep_lora.factors import (
    FOLDED,
    MAGNITUDES,
    SYNONYMS,
    BaseWeight,
    Factors,
    Inexpressible,
    Weights,
    base_weight,
    change,
    decompose_factor,
    product,
)
from acestep_lora.naming import to_upstream

_LYCORIS = {name: synonym for synonym, name in SYNONYMS.items()} | {"lora_magnitude_vector": "dora_scale"}


def lycoris_state(weights: Weights) -> dict[str, Tensor]:
    """`lycoris_layers_0_self_attn_q_proj.lokr_w1`, ... with alpha = rank; a magnitude is `dora_scale` [out, 1]."""
    if weights.kind == "OFT":
        raise Inexpressible("OFT in LyCORIS and ComfyUI rotates the outputs of a weight, PEFT's rotates its inputs.")
    if weights.kind not in FOLDED or (weights.decomposed and weights.kind != "LORA"):
        kind = f"weight-decomposed {weights.kind}" if weights.decomposed else weights.kind
        raise Inexpressible(f"LyCORIS and ComfyUI have no form they read alike for a {kind}.")
    state = {}
    for module, factors in weights.modules.items():
        key = f"lycoris_{to_upstream(module).replace('.', '_')}"
        for factor, tensor in factors.items():
            tensor = tensor[:, None] if factor in MAGNITUDES else tensor
            state[f"{key}.{_LYCORIS.get(factor, factor)}"] = tensor.contiguous()
        state[f"{key}.alpha"] = torch.tensor(float(weights.ranks[module]))
    return state


def lokr_weights(weights: Weights) -> tuple[dict[str, Tensor], dict]:
    """LyCORIS state of a LoKr and the `lokr_config` from which the official app rebuilds exactly these shapes.

    The app knows one rank and ignores `.alpha`: lower ranks are padded with zeros, and products multiplied out where
    LyCORIS keeps the factor whole at that rank.
    """
    factor = decompose_factor(weights, lambda pair: tuple(sorted(pair)))
    if factor is None:
        raise Inexpressible(
            "LyCORIS puts the smaller Kronecker factor first, this LoKr does not: "
            "train with a decompose_factor whose square is at most the smallest width adapted."
        )
    rank = max(weights.ranks.values())
    modules = {
        module: {name: tensor for name, tensor in factors.items() if name in MAGNITUDES}
        | {"lokr_w1": product(factors, "lokr_w1"), **_second_factor(factors, rank)}
        for module, factors in weights.modules.items()
    }
    flags = ("decompose_both", "use_tucker", "use_scalar", "weight_decompose", "full_matrix", "bypass_mode", "rs_lora")
    config = {"linear_dim": rank, "linear_alpha": rank, "factor": factor, **dict.fromkeys(flags, False)}
    config["unbalanced_factorization"] = False
    config["target_modules"] = sorted({to_upstream(module).rpartition(".")[2] for module in modules})
    return lycoris_state(replace(weights, modules=modules, ranks=dict.fromkeys(modules, rank))), config


def _second_factor(factors: Factors, rank: int) -> Factors:
    if "lokr_w2" in factors:
        return {"lokr_w2": factors["lokr_w2"]}
    a, b = factors["lokr_w2_a"], factors["lokr_w2_b"]
    if rank >= max(a.shape[0], b.shape[1]) / 2:
        return {"lokr_w2": a @ b}
    missing = rank - a.shape[1]
    return {"lokr_w2_a": pad(a, (0, missing)), "lokr_w2_b": pad(b, (0, 0, 0, missing))}


def comfyui_state(weights: Weights, norm: str = "merged_norm", base: BaseWeight | None = None) -> dict[str, Tensor]:
    """A LoRA or DoRA as `diffusion_model.decoder.{module}.lora_A.weight`, the rest in LyCORIS's names.

    Args:
        norm: what the reader divides dora_scale by: the norm of the merged weight (as PEFT does) or, "base_norm", of
            the base weight (ComfyUI's weight_decompose before its PR 15458); dora_scale then makes up for it.
        base: needed for base_norm.
    """
    if weights.kind != "LORA":
        return lycoris_state(weights)
    state = {}
    for module, factors in weights.modules.items():
        key = f"diffusion_model.decoder.{to_upstream(module)}"
        state[f"{key}.lora_A.weight"] = factors["lora_A.weight"].contiguous()
        state[f"{key}.lora_B.weight"] = factors["lora_B.weight"].contiguous()
        if "lora_magnitude_vector" in factors:
            scale = factors["lora_magnitude_vector"].double()
            if norm == "base_norm":
                added = change(factors).double()
                weight = base_weight(base, module, added.shape)
                scale = scale * weight.norm(dim=1) / (weight + added).norm(dim=1)
            state[f"{key}.dora_scale"] = scale.float()[:, None].contiguous()
    return state
