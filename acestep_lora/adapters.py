"""Adapters on the frozen transformer: which modules, injected by PEFT, asserted, counted.

Every kind of adapter is a YAML file naming a PEFT config; this module only decides what it is applied to.
"""

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml
from peft import PeftConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from acestep_lora.data.fields import show
from acestep_lora.data.sidecars import read_text
from acestep_lora.errors import UserError
from acestep_lora.layers import CHEAPER, exchange
from acestep_lora.naming import ATTENTION, MLP, NAME, to_diffusers
from acestep_lora.untrusted import told

log = logging.getLogger(__name__)

MAX_RANK = 1 << 16
"""Of one module in a rank_pattern; no dimension of any model is larger."""

MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that take part of the base weight into the adapter."""


class AdapterError(UserError):
    """An adapter's options cannot be met by this model."""


class Adapter:
    """What to adapt, and with which PEFT config.

    Args:
        config: partial of a PEFT config; the modules and their ranks are filled in here.
        r: rank of every module that `rank_pattern` does not name.
        alpha: the update is scaled by alpha / r, in patterns too.
        attention: adapt self-attention, cross-attention, both or none of them.
        mlp: adapt the feed-forward layers as well.
        layers: None for all, or ranges such as "8-23" or "0,4,8-11".
        rank_pattern: module name in upstream's terms -> rank (0 leaves it out), or a YAML file with such a mapping,
            with or without an @ before its name.
        init_from: an adapter to start from (ours, PEFT's or LyCORIS's); it brings its own shape.
        name: what this kind of adapter is called; lr: the learning rate that suits it, which optimizer.lr follows.
        factor: LoKR's, read by `config`.
    """

    def __init__(
        self,
        config: Callable[..., PeftConfig] | None,
        name: str = "lora",
        factor: int = -1,
        r: int = 64,
        alpha: float = 128,
        dropout: float = 0.0,
        attention: str = "both",
        mlp: bool = False,
        layers: str | int | None = None,
        rank_pattern: dict | str | None = None,
        init_from: str | None = None,
        lr: float = 1e-4,
    ) -> None:
        if config is not None and r < 1:
            raise AdapterError(f"adapter.r must be at least 1, got {r}.")
        if not 0 <= dropout < 1:
            raise AdapterError(f"adapter.dropout must be in [0, 1), got {dropout}.")
        if attention not in ("self", "cross", "both", "none"):
            raise AdapterError(f"adapter.attention must be self, cross, both or none, got {attention}.")
        if attention == "none" and not mlp and config is not None:
            raise AdapterError("adapter.attention=none with adapter.mlp=false adapts nothing: set one of them.")
        self.config, self.name, self.r, self.alpha, self.dropout, self.lr = config, name, r, alpha, dropout, lr
        self.attention, self.mlp, self.layers, self.init_from, self.factor = attention, mlp, layers, init_from, factor
        self.rank_pattern = read_pattern(rank_pattern)

    def targets(self, depth: int) -> list[str]:
        """Names of the adapted modules of a transformer with `depth` layers, in upstream's terms."""
        kinds = {"self": ["self_attn"], "cross": ["cross_attn"], "both": ["self_attn", "cross_attn"], "none": []}
        names = [f"{kind}.{projection}" for kind in kinds[self.attention] for projection in ATTENTION]
        names += [f"mlp.{projection}" for projection in MLP] if self.mlp else []
        every = [f"layers.{i}.{name}" for i in parse_layers(self.layers, depth) for name in names]
        beyond = {name for name, rank in self.rank_pattern.items() if rank}.difference(every)
        unknown = sorted(beyond | self.rank_pattern.keys() - set(adaptable(depth)))
        if unknown:
            raise AdapterError(
                f"adapter.rank_pattern names {unknown[0]}, which is not among the adapted modules: adapter.attention, "
                "adapter.mlp and adapter.layers say which they are."
            )
        return [name for name in every if self.rank_pattern.get(name, self.r) > 0]

    def peft_config(self, dit: nn.Module) -> PeftConfig:
        targets = self.targets(len(dit.layers))
        ranks = {to_diffusers(name): rank for name, rank in self.rank_pattern.items() if rank and rank != self.r}
        patterns = {}
        if ranks:
            patterns = {"rank_pattern": ranks, "alpha_pattern": {k: self.alpha * v / self.r for k, v in ranks.items()}}
        try:
            config = self.config(target_modules=[to_diffusers(name) for name in targets], **patterns)
        except TypeError as error:
            raise AdapterError(f"This kind of adapter does not take one of its options: {error}.") from None
        check_factor(config, dit)
        start = getattr(config, "init_lora_weights", True)
        if isinstance(start, str) and start.startswith(MOVES_BASE):
            raise AdapterError(
                f"init_lora_weights={start} changes the base model, so the adapter alone would be wrong."
            )
        return config

    def inject(self, dit: nn.Module) -> int:
        """Add the adapter to the transformer, in float32 and trainable -> number of trainable parameters.

        With no config (adapter=none), every weight of the transformer is trained.
        """
        if self.config is None:
            dit.requires_grad_(True)
            return sum(p.numel() for p in dit.parameters())
        if self.init_from:
            from acestep_lora.adapter_files import apply_adapter

            wanted = apply_adapter(dit, self.init_from, NAME)
        else:
            config = self.peft_config(dit)
            wanted = set(config.target_modules)  # a copy: PEFT shortens the list in place
            inject_adapter_in_model(config, dit, NAME)
        adapted = {name for name, module in dit.named_modules() if isinstance(module, BaseTunerLayer)}
        if adapted != wanted:
            raise AdapterError(f"The adapted modules differ from those asked for, first {sorted(adapted ^ wanted)[0]}.")
        exchange(dit, CHEAPER)
        count = 0
        for name, parameter in dit.named_parameters():
            if f".{NAME}" in name and parameter.requires_grad:
                parameter.data = parameter.data.float()
                count += parameter.numel()
        self._say(dit, adapted, count)
        return count

    def _say(self, dit: nn.Module, adapted: set[str], count: int) -> None:
        if next(dit.parameters()).is_meta:
            return  # only planned
        kind = dit.peft_config[NAME].peft_type.value
        log.info("%s on %d modules, %s trainable parameters", kind, len(adapted), f"{count:,}")
        full = [name for name, module in dit.named_modules() if name.endswith("lokr_w2")]
        if kind == "LOKR" and full:
            log.warning("adapter.r=%d has no effect here: LoKR's second factor is a full matrix.", self.r)


def read_pattern(pattern: dict | str | None) -> dict[str, int]:
    if isinstance(pattern, str):
        with told(f"adapter.rank_pattern={pattern} cannot be read", AdapterError):
            text = read_text(Path(pattern.removeprefix("@")).expanduser())[0]
            if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)):
                raise ValueError("it has aliases, which can unfold without end")
            pattern = yaml.safe_load(text) or {}
            if not isinstance(pattern, dict):
                raise ValueError(f"it holds {show(pattern)}, module names with ranks are expected")
    pattern = dict(pattern or {})
    bad = [name for name, rank in pattern.items() if type(rank) is not int or not 0 <= rank <= MAX_RANK]
    if bad:
        got = f"{show(bad[0])}: {show(pattern[bad[0]])}"
        raise AdapterError(f"adapter.rank_pattern needs whole ranks from 0 to {MAX_RANK}, got {got}.")
    return {str(name): rank for name, rank in pattern.items()}


def adaptable(depth: int) -> list[str]:
    """Every module of a transformer with `depth` layers that an adapter can go onto, in upstream's terms."""
    kinds = [f"{attention}.{projection}" for attention in ("self_attn", "cross_attn") for projection in ATTENTION]
    kinds += [f"mlp.{projection}" for projection in MLP]
    return [f"layers.{i}.{kind}" for i in range(depth) for kind in kinds]


def parse_layers(layers: str | int | None, depth: int) -> list[int]:
    """ "0,4,8-11" -> [0, 4, 8, 9, 10, 11]; None -> every layer of the model."""
    if layers is None:
        return list(range(depth))
    if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text := str(layers).replace(" ", "")):
        raise AdapterError(f"adapter.layers={layers} is not a list of layers such as 8-23 or 0,4,8-11.")
    chosen = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        chosen |= set(range(int(first), int(last or first) + 1))
    if not chosen or max(chosen) >= depth:
        raise AdapterError(f"adapter.layers={layers} does not fit a model with layers 0 to {depth - 1}.")
    return sorted(chosen)


def check_factor(config: PeftConfig, dit: nn.Module) -> None:
    """PEFT and LyCORIS order LoKR factors above the root of a dimension differently: such an adapter cannot travel."""
    factor = getattr(config, "decompose_factor", -1)
    layers = [dit.get_submodule(name) for name in config.target_modules]
    sides = [side for layer in layers for side in (layer.in_features, layer.out_features)]
    if factor**2 > min(sides):
        raise AdapterError(f"adapter.factor={factor} is too large here: its square must not exceed {min(sides)}.")


def cast_by_autocast(dit: nn.Module, on: bool) -> None:
    """Leave casting to autocast, where it is on: PEFT would make float32 copies of every adapted module's input."""
    for module in dit.modules():
        if isinstance(module, BaseTunerLayer):
            module.cast_input_dtype_enabled = not on


def state(dit: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors, in diffusers' module names without the adapter's name."""
    return get_peft_model_state_dict(dit, adapter_name=NAME, save_embedding_layers=False)


@contextmanager
def disabled(dit: nn.Module) -> Iterator[None]:
    """The base model: adapters off inside the block."""
    layers = [module for module in dit.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
