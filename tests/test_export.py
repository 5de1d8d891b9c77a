"""Every exported file, read by the consumer it is for, must give the trained model's output."""

import base64
import copy
import dataclasses
import functools
import http.server
import json
import logging
import shutil
import threading
from pathlib import Path

import pytest
import torch
from diffusers import AceStepPipeline
from diffusers.models.transformers.ace_step_transformer import AceStepAttention
from hypothesis import given
from hypothesis import strategies as st
from lycoris import create_lycoris, create_lycoris_from_weights
from peft import (
    DeloraConfig,
    HRAConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from acestep_lora import export, factors, lowrank
from acestep_lora.adapter_files import apply_adapter, read
from acestep_lora.adapters import AdapterError
from acestep_lora.dit import AceStepDiT, load_dit
from acestep_lora.naming import to_diffusers, to_upstream

TESTS = Path(__file__).parent
ROOT = TESTS.parent
GOLDENS = TESTS / "goldens"
MODEL = GOLDENS / "original" / "acestep-v15-turbo"
METADATA = {"base_model": "ACE-Step/Ace-Step1.5", "trigger_tag": "mytag", "steps": "8", "shift": "3.0"}
DEPTH = 4

torch.set_num_threads(1)
logging.getLogger("LyCORIS").setLevel(logging.ERROR)

# ---------------------------------------------------------------- the models under test

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
MLP = ["gate_proj", "up_proj", "down_proj"]


def names(attention=(), mlp=()):
    blocks = [(block, name) for block in ("self_attn", "cross_attn") for name in attention]
    blocks += [("mlp", name) for name in mlp]
    return [f"layers.{i}.{block}.{name}" for i in range(DEPTH) for block, name in blocks]


TARGETS = {
    "all": names(ATTENTION, MLP),
    "mlp": names(mlp=MLP),
    "vo": names(["to_v", "to_out.0"]),
}
PATTERN = {
    "rank_pattern": {"layers.1.self_attn.to_q": 2, "layers.2.mlp.down_proj": 7},
    "alpha_pattern": {"layers.1.self_attn.to_q": 3, "to_v": 5},
}
KINDS = {
    "lora": lambda **k: LoraConfig(r=4, lora_alpha=8, **k),
    "rslora": lambda **k: LoraConfig(r=4, lora_alpha=8, use_rslora=True, **k),
    "dora": lambda **k: LoraConfig(r=4, lora_alpha=8, use_dora=True, **k),
    "lokr": lambda **k: LoKrConfig(r=2, alpha=6, decompose_factor=4, **k),
    "lokr_full": lambda **k: LoKrConfig(r=64, alpha=16, **k),
    "lokr_both": lambda **k: LoKrConfig(r=2, alpha=6, decompose_both=True, **k),
    "loha": lambda **k: LoHaConfig(r=3, alpha=6, **k),
    "oft": lambda **k: OFTConfig(oft_block_size=8, **k),
}
CASES = [(kind, targets) for kind in ("lora", "dora", "lokr", "loha") for targets in ("mlp", "vo")]
CASES += [(f"{kind}+pattern", "all") for kind in ("lora", "dora", "lokr", "loha")]
CASES += [("rslora", "vo"), ("oft", "vo"), ("lokr_full", "vo"), ("lokr_both", "vo")]


def save(folder, state, config, name="x", base=None, **options):
    options = export.Options(name, base or frozen, **options)
    export.save_adapter(folder, factors.parse(state, config.to_dict(), METADATA), options)


@pytest.fixture(scope="module")
def inputs():
    given, expected = load_file(GOLDENS / "inputs.safetensors"), load_file(GOLDENS / "expected.safetensors")
    return expected["xt"], given["t"], expected["enc_hidden"], expected["context_text2music"]


@pytest.fixture(scope="module")
def base_weights():
    weights = load_file(MODEL / "model.safetensors")
    return {key.removeprefix("decoder."): tensor for key, tensor in weights.items() if key.startswith("decoder.")}


@functools.cache
def base():
    return load_dit(MODEL)


def fresh():
    return copy.deepcopy(base())


def frozen(module):
    return base().get_submodule(module).weight


def config_of(case):
    kind, _, pattern = case[0].partition("+")
    return KINDS[kind](target_modules=list(TARGETS[case[1]]), **(PATTERN if pattern else {}))


@torch.no_grad()
def run(dit, inputs):
    return dit(*inputs)


@pytest.fixture(scope="module")
def trained(inputs):
    """case -> (state, config, output) of the model in memory with random factors; the config as PEFT leaves it."""

    @torch.no_grad()
    def train(case):
        if case not in cache:
            dit, config, size = fresh(), config_of(case), 0.1 if "ora" in case[0] else 0.25
            inject_adapter_in_model(config, dit, "default")
            generator = torch.Generator().manual_seed(sum(map(ord, "".join(case))))
            for name, parameter in dit.named_parameters():
                if ".default" in name:
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.copy_(parameter * (1 + 0.2 * noise) if "magnitude" in name else size * noise)
            state = get_peft_model_state_dict(dit, adapter_name="default")
            cache[case] = {key: tensor.clone() for key, tensor in state.items()}, config, run(dit, inputs)
            assert (cache[case][2] - run(base(), inputs)).abs().max() > 0.05
        return cache[case]

    cache = {}
    return train


@pytest.fixture(scope="module")
def saved(trained, tmp_path_factory):
    """case -> the folder save_adapter writes."""

    def saved(case):
        if case not in cache:
            folder = tmp_path_factory.mktemp("adapter")
            state, config, _ = trained(case)
            save(folder, state, config, name="my run, 音楽")
            cache[case] = folder
        return cache[case]

    cache = {}
    return saved


class UpstreamAttention(AceStepAttention):
    """diffusers' attention with its submodules under upstream's names."""

    to_q = property(lambda self: self.q_proj)
    to_k = property(lambda self: self.k_proj)
    to_v = property(lambda self: self.v_proj)
    to_out = property(lambda self: (self.o_proj, nn.Identity()))
    norm_q = property(lambda self: self.q_norm)
    norm_k = property(lambda self: self.k_norm)


class UpstreamDecoder(AceStepDiT):
    proj_in_conv = property(lambda self: self.proj_in[1])
    proj_out_conv = property(lambda self: self.proj_out[1])


def upstream_decoder():
    decoder = fresh()
    for module in list(decoder.modules()):
        if isinstance(module, AceStepAttention):
            children = {to_upstream(name): child for name, child in module._modules.items() if name != "to_out"}
            module._modules = children | {"o_proj": module.to_out[0]}
            module.__class__ = UpstreamAttention
    for name in ("proj_in", "proj_out"):
        decoder._modules[name] = nn.Sequential(nn.Identity(), decoder._modules.pop(f"{name}_conv"), nn.Identity())
    decoder.__class__ = UpstreamDecoder
    return decoder


def test_upstream_decoder_has_upstreams_names(base_weights, inputs):
    decoder = upstream_decoder()
    assert decoder.state_dict().keys() == base_weights.keys()
    torch.testing.assert_close(run(decoder, inputs), run(base(), inputs), rtol=0, atol=0)


# ---------------------------------------------------------------- consumers


def comfyui(base_weights, file, norm):
    """The decoder with ComfyUI's patches: its key map for ACE-Step 1.5 and its formulas (comfy/weight_adapter)."""
    tensors, patched = load_file(file), {}
    for key, weight in base_weights.items():
        path = key.removesuffix(".weight")
        flat = path.replace(".", "_")
        for form in (f"base_model.model.{path}.", f"diffusion_model.decoder.{path}.", f"lycoris_{flat}."):
            found = {name.removeprefix(form): tensors.pop(name) for name in list(tensors) if name.startswith(form)}
            if found:
                weight = comfyui_weight(weight, found, norm)
        patched[to_diffusers(key)] = weight
    assert not tensors, f"ComfyUI would ignore {next(iter(tensors))}"
    dit = fresh()
    dit.load_state_dict(patched)
    return dit


def comfyui_weight(weight, found, norm):
    alpha, scale = found.pop("alpha", None), found.pop("dora_scale", None)
    if "lora_up.weight" in found:
        up, down = found.pop("lora_up.weight"), found.pop("lora_down.weight")
        diff, rank = up @ down, down.shape[0]
    elif "hada_w1_a" in found:
        w1b = found["hada_w1_b"]
        diff = (found.pop("hada_w1_a") @ found.pop("hada_w1_b")) * (found.pop("hada_w2_a") @ found.pop("hada_w2_b"))
        rank = w1b.shape[0]
    else:
        rank, sides = None, []
        for side in ("lokr_w1", "lokr_w2"):
            if side in found:
                sides.append(found.pop(side))
            else:
                rank = found[f"{side}_b"].shape[0]
                sides.append(found.pop(f"{side}_a") @ found.pop(f"{side}_b"))
        diff = torch.kron(*sides)
    assert not found
    diff = diff * (float(alpha) / rank if alpha is not None and rank is not None else 1.0)
    if scale is None:
        return weight + diff
    assert scale.shape == (weight.shape[0], 1)
    merged = weight + diff
    return merged * scale / (weight if norm == "base_norm" else merged).norm(dim=1, keepdim=True)


def lycoris_official(file):
    """As the official app loads a LoKr: the network rebuilt from lokr_config alone, then the weights."""
    with safe_open(file, framework="pt") as opened:
        config = json.loads(opened.metadata()["lokr_config"])
    decoder = upstream_decoder()
    passed = "factor decompose_both use_tucker use_scalar full_matrix bypass_mode unbalanced_factorization".split()
    network = create_lycoris(
        decoder,
        1.0,
        linear_dim=config["linear_dim"],
        linear_alpha=config["linear_alpha"],
        algo="lokr",
        dora_wd=config["weight_decompose"],
        **{name: config[name] for name in passed},
    )
    network.apply_to()
    assert "unexpected keys" not in network.load_weights(str(file))
    return decoder.eval(), network.eval()


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def comfyui_file(folder):
    (file,) = folder.glob("*_comfyui.safetensors")
    return file


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_peft_on_upstream_names(case, trained, saved, inputs):
    model = PeftModel.from_pretrained(upstream_decoder(), saved(case))
    close(run(model.eval(), inputs), trained(case)[2])


@pytest.mark.parametrize("case", [case for case in CASES if "lora" in case[0] or "dora" in case[0]], ids="-".join)
def test_diffusers_pipeline(case, trained, saved, inputs):
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "condition_encoder", "scheduler"))
    pipeline = AceStepPipeline(transformer=fresh(), **parts)
    pipeline.load_lora_weights(str(saved(case)))
    close(run(pipeline.transformer, inputs), trained(case)[2])


@pytest.mark.parametrize("case", [case for case in CASES if "lokr" in case[0]], ids="-".join)
def test_diffusers_transformer_takes_lokr(case, trained, saved, inputs):
    dit = fresh()
    dit.load_lora_adapter(str(saved(case)), weight_name="pytorch_lora_weights.safetensors")
    close(run(dit, inputs), trained(case)[2])


@pytest.mark.parametrize("case", [case for case in CASES if "lokr" in case[0]], ids="-".join)
def test_official_lokr_loader(case, trained, saved, inputs):
    decoder, network = lycoris_official(saved(case) / "lokr_weights.safetensors")
    close(run(decoder, inputs), trained(case)[2])


@pytest.mark.parametrize("case", [case for case in CASES if "oft" not in case[0]], ids="-".join)
def test_comfyui(case, trained, saved, base_weights, inputs):
    file = comfyui_file(saved(case))
    close(run(comfyui(base_weights, file, None), inputs), trained(case)[2])


# ---------------------------------------------------------------- DoRA in ComfyUI


@pytest.mark.parametrize("targets", ["mlp", "vo"])
@pytest.mark.parametrize("norm", ["base_norm", "merged_norm"])
def test_comfyui_dora_by_norm(norm, targets, trained, base_weights, inputs, tmp_path):
    state, config, expected = trained(("dora", targets))
    save(tmp_path, state, config, comfyui_dora=norm)
    close(run(comfyui(base_weights, comfyui_file(tmp_path), norm), inputs), expected)
    other = {"base_norm": "merged_norm", "merged_norm": "base_norm"}[norm]
    assert (run(comfyui(base_weights, comfyui_file(tmp_path), other), inputs) - expected).abs().max() > 1e-3


def test_comfyui_dora_as_lora_states_rank_and_error(saved):
    with safe_open(comfyui_file(saved(("dora", "vo"))), framework="pt") as opened:
        header = opened.metadata()
        assert not any("dora_scale" in key for key in opened.keys())
    assert 4 < int(header["svd_rank"]) <= 64 and float(header["svd_error"]) <= 1e-6


def test_a_format_that_fails_keeps_the_other_files(trained, tmp_path, caplog):
    def absent(module):
        raise AdapterError("give model.path.")

    state, config, _ = trained(("dora", "vo"))
    save(tmp_path, state, config, base=absent)
    assert "no comfyui file: give model.path." in caplog.text
    expected = {"adapter_model.safetensors", "adapter_config.json", "pytorch_lora_weights.safetensors", "README.md"}
    assert {file.name for file in tmp_path.iterdir()} == expected


# ---------------------------------------------------------------- reading back


def applied(path, inputs, **options):
    dit = fresh()
    apply_adapter(dit, path, **options)
    return run(dit, inputs)


@pytest.mark.parametrize("name", ["lora_r4_a8", "dora_r4_a8", "lokr_d2_a4_f4"])
def test_golden_adapters(name, inputs):
    expected = load_file(GOLDENS / "adapters" / "expected_adapters.safetensors")[f"dec_out_{name}"]
    close(applied(GOLDENS / "adapters" / name, inputs), expected)


@pytest.mark.parametrize("case", [case for case in CASES if case[1] == "vo"], ids="-".join)
def test_every_file_reads_back(case, trained, saved, inputs):
    files = list(saved(case).glob("*.safetensors"))
    for file in files:
        close(applied(file, inputs), trained(case)[2])
    assert len(files) == {"oft": 1, "loha": 2, "lokr": 4}.get(case[0].partition("+")[0][:4], 3)


@pytest.mark.parametrize("case", [("lora+pattern", "all"), ("dora", "vo"), ("lokr+pattern", "all")], ids="-".join)
def test_writing_what_was_read_changes_nothing(case, saved, tmp_path):
    export.save_adapter(tmp_path, read(saved(case)), export.Options("my run, 音楽", frozen))
    assert {file.name for file in tmp_path.iterdir()} == {file.name for file in saved(case).iterdir()}
    for file in tmp_path.iterdir():
        assert file.read_bytes() == (saved(case) / file.name).read_bytes(), file.name


@pytest.mark.parametrize("use_rslora", [False, True])
def test_pefts_own_folder_with_alpha_patterns(use_rslora, inputs, tmp_path):
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=use_rslora,
        init_lora_weights=False,
        target_modules=["q_proj", "v_proj", "down_proj"],
        rank_pattern={"layers.1.self_attn.q_proj": 2, "down_proj": 3},
        alpha_pattern={"cross_attn.v_proj": 1, "layers.1.self_attn.q_proj": 9},
    )
    model = get_peft_model(upstream_decoder(), config).eval()
    model.save_pretrained(tmp_path)
    close(applied(tmp_path, inputs), run(model, inputs))


@torch.no_grad()
def lycoris_trained(algo, **options):
    """A LyCORIS network on the whole decoder of which, as in the official trainer, only attention was trained."""
    decoder = upstream_decoder()
    network = create_lycoris(decoder, 1.0, linear_dim=2, linear_alpha=5, algo=algo, factor=4, **options)
    network.apply_to()
    torch.manual_seed(0)
    for name, parameter in network.named_parameters():
        if "_proj.lokr" in name and "attn" in name:
            parameter.copy_(0.25 * torch.randn_like(parameter))
        if "_proj.dora_scale" in name and "attn" in name:
            parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
    return decoder.eval(), network.eval()


def save_lycoris(network, file, **flags):
    config = {"linear_dim": 2, "linear_alpha": 5, "factor": 4, "target_modules": ["q_proj"], **flags}
    state = {key: tensor.detach().clone() for key, tensor in network.state_dict().items() if "scalar" not in key}
    save_file(state, file, {"algo": "lokr", "format": "lycoris", "lokr_config": json.dumps(config)})


def test_official_lokr_with_untrained_modules(inputs, tmp_path):
    decoder, network = lycoris_trained("lokr")
    save_lycoris(network, tmp_path / "lokr_weights.safetensors")
    close(applied(tmp_path, inputs), run(decoder, inputs))
    assert read(tmp_path).modules.keys() == set(names(ATTENTION))


def test_weight_decomposed_lokr_is_refused(tmp_path):
    _, network = lycoris_trained("lokr", dora_wd=True)
    save_lycoris(network, tmp_path / "lokr_weights.safetensors", weight_decompose=True)
    with pytest.raises(AdapterError, match="not the factors of a LOKR.*magnitude"):
        read(tmp_path)


# ---------------------------------------------------------------- LyCORIS


@pytest.mark.parametrize("case", [case for case in CASES if "oft" not in case[0] and case[1] != "mlp"], ids="-".join)
def test_lycoris_reads_every_kind(case, trained, inputs, tmp_path):
    state, config, expected = trained(case)
    weights = factors.parse(state, config.to_dict(), {})
    (data,) = export.convert(weights, "lycoris", export.Options("x", frozen)).values()
    (tmp_path / "x.safetensors").write_bytes(data)
    decoder = upstream_decoder()
    network, _ = create_lycoris_from_weights(1.0, str(tmp_path / "x.safetensors"), decoder)
    network.apply_to()
    close(run(decoder, inputs), expected)


@pytest.mark.parametrize("case", [("lokr", "vo"), ("lokr_full", "vo")], ids="-".join)
def test_lycoris_merges_lokr(case, trained, saved, inputs):
    decoder, network = lycoris_official(saved(case) / "lokr_weights.safetensors")
    network.restore()
    network.merge_to(1.0)
    close(run(decoder, inputs), trained(case)[2])


def test_factors_lycoris_orders_otherwise(tmp_path, caplog, inputs, base_weights):
    """Factor 16 on 64 is (16, 4) to PEFT and (4, 16) to LyCORIS."""
    config = LoKrConfig(r=2, alpha=4, decompose_factor=16, init_weights=False, target_modules=names(["to_q"]))
    dit = fresh()
    inject_adapter_in_model(config, dit, "default")
    save(tmp_path, get_peft_model_state_dict(dit), config)
    assert "no lycoris file: LyCORIS puts the smaller Kronecker factor first" in caplog.text
    assert not (tmp_path / "lokr_weights.safetensors").exists()
    close(applied(tmp_path, inputs), run(dit, inputs))
    close(run(comfyui(base_weights, comfyui_file(tmp_path), None), inputs), run(dit, inputs))


# ---------------------------------------------------------------- what is written


def test_alpha_is_folded(saved):
    config = json.loads((saved(("rslora", "vo")) / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (4, 4, "LORA")
    assert not config.get("use_rslora") and config["rank_pattern"] == config["alpha_pattern"] == {}
    pattern = json.loads((saved(("lora+pattern", "all")) / "adapter_config.json").read_text(encoding="utf-8"))
    assert (
        pattern["rank_pattern"]
        == pattern["alpha_pattern"]
        == {
            "layers.1.self_attn.q_proj": 2,
            "layers.2.mlp.down_proj": 7,
        }
    )


def test_headers_and_readme(saved):
    folder = saved(("lokr", "vo"))
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            header = opened.metadata()
        assert header["trigger_tag"] == "mytag" and header["steps"] == "8"
        assert ("lokr_config" in header) == (file.name == "lokr_weights.safetensors")
    assert read(folder).metadata["shift"] == "3.0"
    readme = (folder / "README.md").read_text(encoding="utf-8")
    assert all(file.name in readme for file in folder.glob("*.safetensors"))
    assert "- trigger tag: mytag" in readme and "ACE-Step/Ace-Step1.5" in readme
    everything = b"".join(file.read_bytes() for file in folder.iterdir())
    assert str(folder.parent).encode() not in everything and str(TESTS).encode() not in everything


def test_comfyui_file_is_named_after_the_run(saved):
    assert comfyui_file(saved(("lora", "vo"))).name == "my_run_音楽_comfyui.safetensors"
    assert export.Options("../..", frozen).file("comfyui") == "adapter_comfyui.safetensors"


def test_a_failed_write_leaves_the_old_file(saved, trained, tmp_path, monkeypatch):
    state, config, _ = trained(("lora", "vo"))
    save(tmp_path, state, config)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    (tmp_path / "plain").touch()
    assert {file.stat().st_mode for file in tmp_path.iterdir()} == {(tmp_path / "plain").stat().st_mode}
    (tmp_path / "plain").unlink()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save(tmp_path, {key: 2 * tensor for key, tensor in state.items()}, config)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


# ---------------------------------------------------------------- on a transformer


def test_scale(trained, saved, inputs):
    for kind in ("lora", "dora", "lokr", "loha", "oft"):
        assert torch.equal(applied(saved((kind, "vo")), inputs, scale=0.0), run(base(), inputs)), kind
    half = applied(saved(("lora", "vo")), inputs, scale=0.5)
    state, config, _ = trained(("lora", "vo"))
    config = LoraConfig(r=4, lora_alpha=4, target_modules=TARGETS["vo"])
    dit = fresh()
    inject_adapter_in_model(config, dit, "default")
    set_peft_model_state_dict(dit, state)
    close(half, run(dit, inputs))
    with pytest.raises(AdapterError, match="OFT adapter has no strength.*0.5"):
        applied(saved(("oft", "vo")), inputs, scale=0.5)


def summed(base_weights, scales):
    """A transformer of the base weights and what each of these files adds to them, times its strength."""
    expected = {to_diffusers(key): weight.clone() for key, weight in base_weights.items()}
    for path, scale in scales.items():
        weights = read(path)
        for module in weights.modules:
            expected[f"{module}.weight"] += scale * factors.delta(weights, module, frozen).float()
    dit = fresh()
    dit.load_state_dict(expected)
    return dit


@pytest.mark.parametrize("second", ["lora", "dora", "lokr", "loha"])
@pytest.mark.parametrize("first", ["lora", "dora", "lokr", "loha"])
def test_two_adapters_add_up(first, second, saved, base_weights, inputs):
    """Each at its own strength, whatever their kinds, over the same and over different modules."""
    dit, scales = fresh(), {saved((f"{first}+pattern", "all")): 0.5, saved((second, "vo")): 2.0}
    for name, (path, scale) in zip("ab", scales.items(), strict=True):
        apply_adapter(dit, path, name=name, scale=scale)
    close(run(dit, inputs), run(summed(base_weights, scales), inputs))


@pytest.mark.parametrize("pair", [("oft", "lora"), ("dora", "oft")])
def test_oft_stands_alone(pair, saved):
    """It rotates what a module is given: beside another adapter it would rotate that one's inputs too."""
    first, second = (saved((kind, "vo")) for kind in pair)
    dit = fresh()
    apply_adapter(dit, first, name="a")
    with pytest.raises(AdapterError, match="OFT adapter stands beside no other.*export merge"):
        apply_adapter(dit, second, name="b")


@pytest.mark.parametrize("case", ["dora", "loha"])
def test_strength_is_that_of_merging(case, saved, base_weights, inputs):
    for scale in (0.5, -1.0):
        expected = run(summed(base_weights, {saved((case, "vo")): scale}), inputs)
        close(applied(saved((case, "vo")), inputs, scale=scale), expected)


def test_adapter_stays_float32_on_a_bf16_model(trained, saved):
    dit = load_dit(MODEL, dtype=torch.bfloat16)
    apply_adapter(dit, saved(("lora", "vo")))
    state = trained(("lora", "vo"))[0]
    loaded = get_peft_model_state_dict(dit)
    assert all(torch.equal(loaded[key], tensor) for key, tensor in state.items() if "lora_A" in key)


@pytest.mark.parametrize(
    ("kind", "options"), [(HRAConfig, {}), (DeloraConfig, {"rank_pattern": {"layers.1.self_attn.to_q": 2}})]
)
def test_a_kind_of_peft_that_nothing_here_knows(kind, options, inputs, base_weights, tmp_path):
    """A YAML of another PEFT config: saved, read by PEFT and by us, approximated for ComfyUI."""
    config = kind(r=4, target_modules=names(["to_q"], ["down_proj"]), **options)
    dit, generator = fresh(), torch.Generator().manual_seed(1)
    inject_adapter_in_model(config, dit, "default")
    for name, parameter in dit.named_parameters():
        if ".default" in name:
            torch.nn.init.normal_(parameter, generator=generator)
    expected = run(dit, inputs)
    assert (expected - run(base(), inputs)).abs().max() > 0.05
    state = get_peft_model_state_dict(dit)
    save(tmp_path, state, config, approximate=None if options else "svd")
    close(run(PeftModel.from_pretrained(upstream_decoder(), tmp_path).eval(), inputs), expected)
    close(applied(tmp_path, inputs), expected)
    if not options:
        close(run(comfyui(base_weights, comfyui_file(tmp_path), None), inputs), expected)


# ---------------------------------------------------------------- approximation


def test_svd_error_is_the_measured_one(trained, base_weights):
    state, config, _ = trained(("loha", "mlp"))
    weights = factors.parse(state, config.to_dict(), {})
    exact, rough = (lowrank.nearest_lora(weights, frozen, lowrank.Limits(max_rank=r)) for r in (None, 2))
    assert exact.metadata["svd_rank"] == "9" and float(exact.metadata["svd_error"]) <= 1e-6
    errors = []
    for module in weights.modules:
        target = factors.change(weights.modules[module])
        errors.append(float((factors.change(rough.modules[module]) - target).norm() / target.norm()))
    assert rough.metadata["svd_rank"] == "2"
    assert float(rough.metadata["svd_error"]) == pytest.approx(max(errors), rel=0.05)
    loose = lowrank.nearest_lora(weights, frozen, lowrank.Limits(tolerance=0.3))
    assert int(loose.metadata["svd_rank"]) < 9 and 1e-3 < float(loose.metadata["svd_error"]) <= 0.3


@pytest.mark.parametrize("case", [("oft", "vo"), ("loha", "vo")], ids="-".join)
def test_approximation_for_every_consumer(case, trained, base_weights, inputs, tmp_path):
    state, config, expected = trained(case)
    save(tmp_path, state, config, approximate="svd")
    close(run(comfyui(base_weights, comfyui_file(tmp_path), None), inputs), expected)
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "condition_encoder", "scheduler"))
    pipeline = AceStepPipeline(transformer=fresh(), **parts)
    pipeline.load_lora_weights(str(tmp_path))
    close(run(pipeline.transformer, inputs), expected)


# ---------------------------------------------------------------- the command


@pytest.fixture
def command(configure, tmp_path):
    def run(path, *overrides):
        given = [f"adapter.path={path}", f"output={tmp_path}", "model.path=null", *overrides]
        return export.main(configure("export", *given))

    return run


@pytest.mark.parametrize("format", ["peft", "diffusers", "comfyui", "lycoris"])
def test_command_converts(format, command, saved, inputs, trained, capsys, tmp_path):
    case = ("lokr", "vo")
    assert command(saved(case), f"format={format}") == 0
    written = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert set(written) == set(tmp_path.iterdir())
    close(applied(tmp_path, inputs), trained(case)[2])
    assert read(tmp_path).metadata["trigger_tag"] == "mytag"


def test_command_reads_base_weights(command, saved, trained, base_weights, inputs, tmp_path):
    case = ("dora", "vo")
    assert (
        command(saved(case), "comfyui_dora=base_norm", f"model.path={MODEL.parent}", f"model.variant={MODEL.name}") == 0
    )
    close(run(comfyui(base_weights, comfyui_file(tmp_path), "base_norm"), inputs), trained(case)[2])


NO_BASE = "weights of the base model are needed.*model.path"


@pytest.mark.parametrize(
    ("case", "overrides", "message"),
    [
        (("oft", "vo"), ["format=comfyui"], "no form that means the same as PEFT's OFT.*approximate=svd"),
        (("oft", "vo"), ["format=lycoris", "approximate=svd"], NO_BASE),
        (("loha", "vo"), ["format=diffusers"], "diffusers loads LoRA, DoRA and LoKr, not LOHA.*approximate=svd"),
        (("dora", "vo"), ["format=comfyui"], NO_BASE),
        (
            ("dora", "vo"),
            ["format=comfyui", f"model.path={ROOT / 'data/models/nano'}"],
            "it was trained on another model",
        ),
        (("lora", "vo"), ["format=gguf"], "format must be one of .*, got gguf"),
        (("lora", "vo"), ["comfyui_dora=both"], "comfyui_dora must be .*, got both"),
        (("lora", "vo"), ["approximate=yes"], "approximate must be .*svd"),
    ],
)
def test_command_refuses(case, overrides, message, command, saved, tmp_path):
    with pytest.raises(AdapterError, match=message):
        command(saved(case), *overrides)
    assert not list(tmp_path.iterdir())


def test_command_keeps_a_lokr_folder_apart(command, saved, tmp_path):
    (tmp_path / "lokr_weights.safetensors").touch()
    with pytest.raises(AdapterError, match="would load first"):
        command(saved(("lora", "vo")), "format=peft")


# ---------------------------------------------------------------- merge, resize, extract, inspect, push


@pytest.mark.parametrize("case", [("lora+pattern", "all"), ("lokr", "vo"), ("lokr_full", "vo"), ("loha", "mlp")])
def test_singular_values_come_from_small_factors(case, saved):
    """As LAPACK has them of the whole product, and the vectors rebuild it."""
    weights = read(saved(case))
    for module in weights.modules:
        whole = factors.delta(weights, module, None)
        found = lowrank.spectrum(weights, module, None)
        expected = torch.linalg.svdvals(whole)[: len(found.s)]
        torch.testing.assert_close(found.s[: len(expected)], expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found.u * found.s @ found.v, whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("first", "second"), [("lora", "lora"), ("lora", "lokr"), ("dora", "loha")])
def test_merged_adapters_do_what_they_do_together(first, second, command, saved, inputs, tmp_path):
    paths = [saved((f"{first}+pattern", "all")), saved((second, "vo"))]
    expected = fresh()
    with torch.no_grad():
        for path, scale in zip(paths, (1.0, -0.5), strict=True):
            weights = read(path)
            for module in weights.modules:
                expected.get_submodule(module).weight += scale * factors.delta(weights, module, frozen).float()
    given = [f"model.path={MODEL.parent}", f"model.variant={MODEL.name}"] if first == "dora" else []
    assert command(f"[{paths[0]},{paths[1]}]", "verb=merge", "adapter.scale=[1,-0.5]", *given) == 0
    close(applied(tmp_path, inputs), run(expected, inputs))
    said = read(tmp_path).metadata
    assert (said["trigger_tag"], said["merge_weights"], said["shift"]) == ("mytag", "1, -0.5", "3.0")


def test_resized_is_the_nearest_of_its_rank(command, saved, tmp_path):
    """Eckart and Young: what is lost are the singular values left out, nothing more."""
    case = ("loha+pattern", "all")
    assert command(saved(case), "verb=resize", "max_rank=3", "dtype=bfloat16") == 0
    before, after = read(saved(case)), read(tmp_path)
    assert {factors.rank(parts) for parts in after.modules.values()} == {3}
    lost = whole = 0.0
    for module in before.modules:
        target = factors.change(before.modules[module])
        tail = float(torch.linalg.svdvals(target)[3:].norm())
        assert (factors.change(after.modules[module]) - target).norm() == pytest.approx(tail, rel=0.01)
        lost, whole = lost + tail**2, whole + float(target.norm()) ** 2
    assert float(after.metadata["svd_kept"]) == pytest.approx(1 - lost / whole, abs=1e-3)


@pytest.mark.parametrize("size", [0.04, 0.1, 0.2])
def test_a_size_is_kept_and_spent_where_the_adapter_does_most(size, command, saved, tmp_path):
    """Any one rank for all that is no larger holds less."""
    weights = read(saved(("lora+pattern", "all")))
    louder = {
        m: {k: t * (20 if "layers.2" in m and "B" in k else 1) for k, t in f.items()}
        for m, f in weights.modules.items()
    }
    loud = tmp_path / "loud"
    export.save_adapter(loud, dataclasses.replace(weights, modules=louder), export.Options("loud", frozen))
    assert command(loud, "verb=resize", f"size={size}") == 0
    files = [file for file in tmp_path.glob("*.safetensors") if "comfyui" not in file.name]
    assert len(files) == 2 and all(file.stat().st_size <= size * 1e6 for file in files)
    small = read(tmp_path)
    spent = sum(t.numel() for parts in small.modules.values() for t in parts.values())
    for r in range(1, 5):
        flat = lowrank.nearest_lora(read(loud), frozen, lowrank.Limits(max_rank=r))
        if sum(t.numel() for parts in flat.modules.values() for t in parts.values()) <= spent:
            assert float(flat.metadata["svd_kept"]) <= float(small.metadata["svd_kept"]) + 1e-4
    highest = max(small.modules, key=lambda module: factors.rank(small.modules[module]))
    assert ".2." in highest


def test_extract_finds_what_was_merged_into_a_model(configure, saved, inputs, trained, tmp_path, capsys):
    case = ("lora", "vo")
    weights, tuned = read(saved(case)), tmp_path / "models" / MODEL.name
    shutil.copytree(MODEL, tuned)
    state = load_file(tuned / "model.safetensors")
    for module in weights.modules:
        key = f"decoder.{to_upstream(module)}.weight"
        state[key] = state[key] + factors.change(weights.modules[module]).to(state[key].dtype)
    norm = next(key for key in state if key.startswith("decoder.layers.0.") and "norm" in key)
    state[norm] = state[norm] + 0.5
    save_file(state, tuned / "model.safetensors")
    given = [f"model.path={MODEL.parent}", f"model.variant={MODEL.name}", f"tuned={tuned.parent}", "max_rank=4"]
    cfg = configure("export", "verb=extract", "adapter.path=null", f"output={tmp_path / 'out'}", *given)
    assert export.main(cfg) == 0 and "of it lay elsewhere" in capsys.readouterr().out
    found = read(tmp_path / "out")
    assert found.modules.keys() == weights.modules.keys()
    assert 0 < float(found.metadata["extract_outside"]) < 1
    close(applied(tmp_path / "out", inputs), trained(case)[2])


def test_inspect_says_what_is_in_a_file(command, saved, trained, capsys, tmp_path):
    state, config, _ = trained(("lora+pattern", "all"))
    for key in state:
        if "layers.3" in key:
            state[key] = 20 * state[key]
    save(tmp_path / "loud", state, config)
    assert command(tmp_path / "loud", "verb=inspect") == 0
    said = capsys.readouterr().out
    assert "trigger tag: mytag" in said and "shift: 3.0" in said and "LORA" in said
    rows = {cells[1].strip(): cells for line in said.splitlines() if len(cells := line.split("│")) > 3}
    assert rows["self_attn.q_proj"][2].strip() == "4" and rows["self_attn.q_proj"][3].strip() == "2-4"
    assert said.split("first to last: ")[1][:4].endswith("█") and "█" not in said.split("first to last: ")[1][:3]
    for kind in ("dora", "oft", "lokr"):
        assert command(saved((kind, "vo")), "verb=inspect") == 0


def test_inspect_of_an_untrained_adapter(command, capsys, tmp_path):
    dit = fresh()
    inject_adapter_in_model(config := config_of(("lora", "vo")), dit, "default")
    save(tmp_path / "new", get_peft_model_state_dict(dit), config)
    assert command(tmp_path / "new", "verb=inspect") == 0
    assert "does nothing" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["verb=shrink"], "shrink is none of convert, inspect, merge, resize, extract, push"),
        (["verb=resize"], "How small is it to be.*max_rank=16"),
        (["verb=resize", "size=0.001"], "too small for a single rank"),
        (["verb=extract"], "Give tuned=FOLDER"),
        (["verb=merge", "adapter.scale=[1,2]"], "2 strengths for 1 adapters"),
        (["verb=push"], "repo=YOUR_NAME"),
        (["dtype=int8"], "dtype must be one of float32, float16, bfloat16"),
    ],
)
def test_tools_refuse(overrides, message, command, saved, tmp_path):
    with pytest.raises(AdapterError, match=message):
        command(saved(("lora", "vo")), *overrides)
    assert not list(tmp_path.iterdir())


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's API as an upload of small files takes."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append((self.path, self.headers["Authorization"], body))
        name, home = "me/my-style", f"http://127.0.0.1:{self.server.server_port}"
        answers = {
            "/api/repos/create": {"url": f"{home}/{name}", "name": name},
            "/api/validate-yaml": {"errors": [], "warnings": []},
            f"/api/models/{name}/commit/main": {"commitUrl": f"{home}/{name}/commit/1", "commitOid": "1"},
        }
        if "/preupload/" in self.path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            answers[self.path] = {"files": files}
        self._answer(answers[self.path])

    def do_GET(self):
        self._answer({"id": "me/my-style", "siblings": [], "sha": "0"})

    def _answer(self, value):
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(value).encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", endpoint)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    yield server
    server.shutdown()
    server.server_close()


def test_push_uploads_the_adapter_and_nothing_beside_it(command, saved, hub, capsys, tmp_path):
    folder = tmp_path / "mine"
    shutil.copytree(saved(("lora", "vo")), folder)
    (folder / "private.txt").write_text("not for anybody", encoding="utf-8")
    assert command(folder, "verb=push", "repo=me/my-style") == 0
    assert "me/my-style" in capsys.readouterr().out
    asked = {path: body for path, _, body in hub.asked}
    created = json.loads(asked["/api/repos/create"])
    assert created.get("visibility") == "private" or created["private"] is True  # newer and older clients
    assert {token for _, token, _ in hub.asked} == {"Bearer hf_secret"}
    lines = [json.loads(line) for line in asked["/api/models/me/my-style/commit/main"].splitlines()]
    sent = {line["value"]["path"]: line["value"]["content"] for line in lines if line["key"] == "file"}
    assert sent.keys() == {file.name for file in folder.iterdir()} - {"private.txt"}
    data = base64.b64decode(sent["adapter_model.safetensors"])
    assert data == (folder / "adapter_model.safetensors").read_bytes()


def test_push_without_credentials(command, saved, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(AdapterError, match="no credentials for the hub: hf auth login"):
        command(saved(("lora", "vo")), "verb=push", "repo=me/x")


# ---------------------------------------------------------------- untrusted files


def golden(tmp_path, change_config=None, change_state=None):
    source = GOLDENS / "adapters" / "lora_r4_a8"
    config = json.loads((source / "adapter_config.json").read_text(encoding="utf-8"))
    state = load_file(source / "adapter_model.safetensors")
    config |= change_config or {}
    state |= change_state or {}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    state = {key: tensor for key, tensor in state.items() if tensor is not None}
    save_file(state, tmp_path / "adapter_model.safetensors")
    return tmp_path


Q = "base_model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change_config", "change_state", "message"),
    [
        ({"peft_type": "PREFIX_TUNING"}, {}, "target_modules"),
        ({"peft_type": ["x"]}, {}, "not a valid PeftType"),
        ({"modules_to_save": ["norm_out"]}, {}, "modules_to_save=.* is not supported"),
        ({"bias": "all"}, {}, "bias='all' in its PEFT config is not supported"),
        ({"init_lora_weights": "pissa_niter_4"}, {}, "init_lora_weights='pissa_niter_4' .* is not supported"),
        ({"from_a_later_version": True}, {}, "from_a_later_version=True .* is not supported"),
        ({"lora_alpha": "8"}, {}, "unsupported operand"),
        ({"lora_alpha": 1e300}, {}, "NaN or infinite"),
        ({"alpha_pattern": {"(l+a*)+x": 3}}, {}, "alpha_pattern=.* is not supported"),
        ({}, {"base_model.model.encoder.q_proj.lora_A.weight": torch.ones(1, 1)}, "does not belong to a layer"),
        ({}, {f"{Q}.lora_A.weight": None}, "q_proj: these are not the factors of a LORA"),
        ({}, {f"{Q}.lora_A.weight": torch.ones(5, 64)}, "q_proj: these are not the factors of a LORA"),
        ({}, {f"{Q}.lora_A.weight": torch.full((4, 64), torch.nan)}, "q_proj holds NaN"),
        ({}, {f"{Q}.hada_w1_a": torch.ones(4, 64)}, "not the factors of a LORA.*hada_w1_a"),
        ({}, {f"{Q}.lora_E": torch.ones(4, 64)}, "not the factors of a LORA.*lora_E"),
    ],
)
def test_bad_folders_are_refused(change_config, change_state, message, tmp_path):
    with pytest.raises(AdapterError, match=message) as caught:
        read(golden(tmp_path, change_config, change_state))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_unread_fields_do_no_harm(inputs, tmp_path):
    folder = golden(tmp_path, {"target_modules": "(a+)+$", "auto_mapping": {"x": "y"}, "from_a_later_version": None})
    expected = load_file(GOLDENS / "adapters" / "expected_adapters.safetensors")["dec_out_lora_r4_a8"]
    close(applied(folder, inputs), expected)


def test_other_files_are_refused(tmp_path):
    for name in ("adapter.bin", "adapter.pt", "adapter.ckpt"):
        (tmp_path / name).write_bytes(b"anything")
        with pytest.raises(AdapterError, match="other kinds can run code"):
            read(tmp_path / name)
    with pytest.raises(AdapterError, match="there is no adapter_model.safetensors"):
        read(tmp_path)
    with pytest.raises(AdapterError, match="nowhere cannot be used as an adapter: there is no"):
        read(tmp_path / "nowhere")
    (tmp_path / "torn.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(AdapterError, match="cannot be used as an adapter: .*header"):
        read(tmp_path)


def test_peft_weights_without_their_config_are_refused(tmp_path):
    golden(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(AdapterError, match="adapter_config.json"):
        read(tmp_path)


def test_base_norm_dora_is_not_read_as_one(trained, tmp_path):
    state, config, _ = trained(("dora", "vo"))
    save(tmp_path, state, config, comfyui_dora="base_norm")
    with pytest.raises(AdapterError, match="base_norm"):
        read(comfyui_file(tmp_path))


def test_a_run_folder_means_its_adapter(saved, inputs, trained, tmp_path):
    shutil.copytree(saved(("lora", "vo")), tmp_path / "adapter")
    close(applied(tmp_path, inputs), trained(("lora", "vo"))[2])


def test_adapter_of_another_model(tmp_path, inputs):
    state = load_file(GOLDENS / "adapters" / "lora_r4_a8" / "adapter_model.safetensors")
    deeper = {key.replace("layers.3.", "layers.30."): tensor for key, tensor in state.items()}
    save_file(deeper, tmp_path / "deeper.safetensors")
    with pytest.raises(AdapterError, match="trained on another model than model.path: layers.30.*missing here"):
        applied(tmp_path / "deeper.safetensors", inputs)
    wider = {key: torch.cat([tensor, tensor], 1) if "lora_A" in key else tensor for key, tensor in state.items()}
    save_file(wider, tmp_path / "wider.safetensors")
    with pytest.raises(AdapterError, match=r"lora_A.weight is \(4, 128\) in it and \(4, 64\) here"):
        applied(tmp_path / "wider.safetensors", inputs)


# ---------------------------------------------------------------- names

FORMS = [
    lambda d, u: f"base_model.model.{u}.lora_A.weight",
    lambda d, u: f"transformer.{d}.lora_A.weight",
    lambda d, u: f"diffusion_model.decoder.{u}.lora_down.weight",
    lambda d, u: f"diffusion_model.{u}.lora_A.weight",
    lambda d, u: f"lycoris_{u.replace('.', '_')}.lora_down.weight",
    lambda d, u: f"lora_unet_decoder_{u.replace('.', '_')}.lora_down.weight",
    lambda d, u: f"decoder.{u}.lora_A.weight",
    lambda d, u: f"{d}.lora_A.weight",
]
PROJECTIONS = [("self_attn", n) for n in ATTENTION] + [("cross_attn", n) for n in ATTENTION] + [("mlp", n) for n in MLP]


@given(st.integers(0, 999), st.sampled_from(PROJECTIONS), st.sampled_from(FORMS))
def test_any_form_names_the_same_module(layer, projection, form):
    module = f"layers.{layer}.{projection[0]}.{projection[1]}"
    assert factors.split(form(module, to_upstream(module))) == (module, "lora_A.weight")


@given(st.text(max_size=40))
def test_no_name_is_guessed(key):
    with pytest.raises(AdapterError):
        factors.split(key)
