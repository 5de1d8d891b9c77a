"""Changes of weights as LoRAs: the nearest one of a rank, an error or a size, several added up, two models apart.

Eckart and Young 1936: of all matrices of rank r, the r largest singular values make the nearest one.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from acestep_lora.adapters import AdapterError
from acestep_lora.factors import BaseWeight, Factors, Weights, change, delta, product, rank
from acestep_lora.naming import ATTENTION, MLP, to_diffusers


@dataclass(frozen=True)
class Limits:
    """How exact a LoRA must be, and how large it may be.

    Args:
        tolerance: relative error (Frobenius) allowed in each module.
        max_rank: largest rank of a module; None for any.
        parameters: number of them in all; None for any. They go where they hold most of the change.
    """

    tolerance: float = 1e-6
    max_rank: int | None = None
    parameters: int | None = None


@dataclass(frozen=True)
class Spectrum:
    """A matrix as u diag(s) v. u [out, k], s [k] falling, v [k, in]."""

    u: Tensor
    s: Tensor
    v: Tensor

    @classmethod
    def of(cls, matrix: Tensor) -> "Spectrum":
        return cls(*torch.linalg.svd(matrix, full_matrices=False))

    @classmethod
    def of_product(cls, left: Tensor, right: Tensor) -> "Spectrum":
        """Of left [out, r] @ right [r, in], by matrices of the size of r."""
        q_left, r_left = torch.linalg.qr(left)
        q_right, r_right = torch.linalg.qr(right.T)
        inner = cls.of(r_left @ r_right.T)
        return cls(q_left @ inner.u, inner.s, inner.v @ q_right.T)

    @classmethod
    def of_kron(cls, first: "Spectrum", second: "Spectrum") -> "Spectrum":
        """Of a Kronecker product: its singular values are the products of those of its factors."""
        s, order = torch.outer(first.s, second.s).flatten().sort(descending=True)
        u, v = (torch.kron(a.contiguous(), b.contiguous()) for a, b in ((first.u, second.u), (first.v, second.v)))
        return cls(u[:, order], s, v[order])

    def rank_within(self, tolerance: float) -> int:
        """The smallest rank whose relative error (Frobenius) is within it."""
        left_out = self.s.square().flip(0).cumsum(0).flip(0).sqrt()  # by rank 0, 1, ...
        return int((left_out > tolerance * left_out[0]).sum())

    def cut(self, r: int) -> "Spectrum":
        """The largest r, in float32."""
        return Spectrum(self.u[:, :r].float(), self.s[:r].float(), self.v[:r].float())

    def lora(self, r: int) -> Factors:
        return {"lora_A.weight": self.v[:r].contiguous(), "lora_B.weight": self.u[:, :r] * self.s[:r]}


def spectrum(weights: Weights, module: str, base: BaseWeight) -> Spectrum:
    """Of what an adapter adds to one weight, float64; from its small factors where it has them."""
    parts = {name: tensor.double() for name, tensor in weights.modules[module].items()}
    if parts.keys() == {"lora_A.weight", "lora_B.weight"}:
        return Spectrum.of_product(parts["lora_B.weight"], parts["lora_A.weight"])
    if weights.kind == "LOKR":
        whole = "lokr_w2" in parts
        second = Spectrum.of(parts["lokr_w2"]) if whole else Spectrum.of_product(parts["lokr_w2_a"], parts["lokr_w2_b"])
        return Spectrum.of_kron(Spectrum.of(product(parts, "lokr_w1")), second)
    return Spectrum.of(delta(weights, module, base))


def spend(spectra: Mapping[str, Spectrum], parameters: int) -> dict[str, int]:
    """Rank of each module, so that all cost no more than `parameters` and hold as much of the changes as these can."""
    pieces = []
    for module, found in spectra.items():
        cost = len(found.u) + found.v.shape[1]
        pieces += [(float(s) ** 2 / cost, cost, module) for s in found.s]
    ranks = dict.fromkeys(spectra, 0)
    for _, cost, module in sorted(pieces, reverse=True):
        if cost > parameters:
            break
        parameters -= cost
        ranks[module] += 1
    return ranks


@torch.no_grad()
def nearest(
    modules: Iterable[str],
    target: Callable[[str], Tensor],
    spectrum: Callable[[str], Spectrum],
    limits: Limits,
) -> tuple[dict[str, Factors], dict[str, str]]:
    """-> factors of the nearest LoRA within the limits, by module, and what was measured on them.

    svd_rank is the largest rank, svd_error the largest relative error of a module, svd_kept the share of the squared
    change that is held in all. A module on which no parameter is spent is left out.

    Args:
        target: module -> the change that is wanted, float64 [out, in]; spectrum: its singular values.
    """
    spectra, sizes = {}, {}
    for name in modules:
        found = spectrum(name)
        sizes[name] = max(float(found.s.norm()), 1e-300)
        spectra[name] = found.cut(max(1, min(found.rank_within(limits.tolerance), limits.max_rank or len(found.s))))
    ranks = {name: len(found.s) for name, found in spectra.items()}
    if limits.parameters is not None:
        ranks = spend(spectra, limits.parameters)
    loras = {name: found.lora(ranks[name]) for name, found in spectra.items() if ranks[name]}
    if not loras:
        raise AdapterError("That is too small for a single rank: give a larger size.")
    missing = dict(sizes)
    for name, parts in loras.items():
        missing[name] = float((change({k: t.double() for k, t in parts.items()}) - target(name)).norm())
    lost, whole = (sum(size**2 for size in each.values()) for each in (missing, sizes))
    measured = {
        "svd_rank": str(max(map(rank, loras.values()))),
        "svd_error": f"{max(missing[name] / sizes[name] for name in sizes):.1e}",
        "svd_kept": f"{1 - lost / whole:.4f}",
    }
    return loras, measured


def nearest_lora(weights: Weights, base: BaseWeight, limits: Limits, modules: Iterable[str] | None = None) -> Weights:
    """An adapter of any kind as the nearest plain LoRA; metadata says what was measured on it."""
    loras, measured = nearest(
        weights.modules if modules is None else modules,
        lambda module: delta(weights, module, base),
        lambda module: spectrum(weights, module, base),
        limits,
    )
    return Weights("LORA", loras, {}, weights.metadata | measured)


def merge(adapters: Sequence[tuple[Weights, float]], base: BaseWeight) -> Weights:
    """What several adapters do together, each at its strength, as one plain LoRA: exact, of the sum of their ranks.

    Metadata stays where all agree; trigger tags are strung together.
    """
    modules: dict[str, Factors] = {}
    for weights, scale in adapters:
        if weights.kind != "LORA" or weights.decomposed:
            weights = nearest_lora(weights, base, Limits())
        for module, parts in weights.modules.items():
            down, up = parts["lora_A.weight"], scale * parts["lora_B.weight"]
            if module in modules:
                down = torch.cat([modules[module]["lora_A.weight"], down])
                up = torch.cat([modules[module]["lora_B.weight"], up], 1)
            modules[module] = {"lora_A.weight": down, "lora_B.weight": up}
    said = [weights.metadata for weights, _ in adapters]
    metadata = {key: text for key, text in said[0].items() if all(other.get(key) == text for other in said)}
    tags = dict.fromkeys(text for each in said if (text := each.get("trigger_tag")))
    strengths = ", ".join(f"{scale:g}" for _, scale in adapters)
    return Weights("LORA", modules, {}, metadata | {"trigger_tag": ", ".join(tags), "merge_weights": strengths})


def extract(tuned: nn.Module, base: nn.Module, limits: Limits, watch: Callable[[list[str]], Iterable[str]]) -> Weights:
    """The LoRA nearest to what fine-tuning has changed in the attention and feed-forward layers of a transformer.

    `extract_outside` is the share of the squared change that lies elsewhere, in norms and embeddings, and is lost.

    Args:
        watch: wraps the list of modules that is gone through, to show progress.
    """
    before, after = dict(base.named_parameters()), dict(tuned.named_parameters())

    def difference(module: str) -> Tensor:
        return after[f"{module}.weight"].detach().double() - before[f"{module}.weight"].detach().double()

    names = [to_diffusers(name) for name in (*ATTENTION, *MLP)]
    linear = [
        name.removesuffix(".weight") for name in before if name.startswith("layers.") and name.endswith(".weight")
    ]
    changed = [name for name in linear if name.endswith(tuple(f".{end}" for end in names)) and difference(name).any()]
    if not changed:
        raise AdapterError(
            "The two models have the same attention and feed-forward weights: there is nothing to extract."
        )
    loras, measured = nearest(watch(changed), difference, lambda module: Spectrum.of(difference(module)), limits)
    everything = sum(float((after[n].detach().double() - before[n].detach().double()).square().sum()) for n in before)
    inside = sum(float(difference(name).square().sum()) for name in changed)
    return Weights("LORA", loras, {}, measured | {"extract_outside": f"{1 - inside / everything:.4f}"})
