"""Module names: upstream's (checkpoints, exported adapters, all a user reads) and diffusers' (classes in memory).

Upstream says `layers.3.self_attn.q_proj`, diffusers `layers.3.self_attn.to_q`. The table is acestep's own converter's,
measured key by key in both directions (no key left over, none missing).
"""

_PAIRS = (
    ("proj_in.1", "proj_in_conv"),
    ("proj_out.1", "proj_out_conv"),
    ("q_proj", "to_q"),
    ("k_proj", "to_k"),
    ("v_proj", "to_v"),
    ("o_proj", "to_out.0"),
    ("q_norm", "norm_q"),
    ("k_norm", "norm_k"),
)
NAME = "default"
"""What PEFT calls the adapter that is trained."""
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def _rename(key: str, pairs) -> str:
    dotted = f".{key}."
    for old, new in pairs:
        dotted = dotted.replace(f".{old}.", f".{new}.")
    return dotted[1:-1]


def to_diffusers(key: str) -> str:
    return _rename(key, _PAIRS)


def to_upstream(key: str) -> str:
    return _rename(key, [(new, old) for old, new in _PAIRS])
