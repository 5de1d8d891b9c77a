"""Base models on disk: both layouts found and read completely, and one sentence for each way a folder can be wrong."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from builders import CONFIG, NANO, VARIANT, base_model, write_variant
from diffusers.pipelines.ace_step import AceStepConditionEncoder
from safetensors.torch import load_file, save_file

from acestep_lora import basemodel
from acestep_lora.basemodel import BaseModelError
from acestep_lora.dit import load_dit
from acestep_lora.hashes import FileHashes

REPO = "ACE-Step/Ace-Step1.5"
COMPONENTS = ("decoder", "encoder", "tokenizer", "detokenizer")


def find(path, variant=VARIANT, **options) -> basemodel.BaseModel:
    return basemodel.find(str(path), variant=variant, repo=REPO, **options)


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return base_model(tmp_path_factory.mktemp("original"))


@pytest.fixture
def variant(golden_variant, tmp_path) -> Path:
    """A copy of the golden checkpoint to spoil."""
    return Path(shutil.copytree(golden_variant, tmp_path / VARIANT))


def edit(folder: Path, **changes) -> Path:
    """Change config.json; `None` is JSON's null, `...` removes a key."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}), encoding="utf-8")
    return folder


# ---------------------------------------------------------------- finding the parts


def test_diffusers_layout():
    base = find(NANO)
    assert not base.original
    names = ["transformer", "condition_encoder", "vae", "text_encoder", "tokenizer", "audio_tokenizer"]
    assert [getattr(base, field.name) for field in fields(base)] == [
        NANO / name for name in [*names, "audio_token_detokenizer"]
    ]
    assert (base.sample_rate, base.hop, base.channels, base.frame_rate) == (12000, 480, 48, 25.0)
    assert base.timestep_law() == (-0.4, 1.0)


def test_upstream_layout(original):
    base = find(original)
    dit, text = original / VARIANT, original / "Qwen3-Embedding-0.6B"
    assert base.original
    assert [getattr(base, field.name) for field in fields(base)] == [dit, dit, original / "vae", text, text, dit, dit]
    assert (base.sample_rate, base.hop, base.channels, base.frame_rate) == (24000, 1200, 8, 20.0)
    assert base.timestep_law() == (-0.2, 0.8)


def test_a_single_variant_takes_its_siblings_or_parts_path(original, golden_variant, tmp_path):
    assert find(original / VARIANT) == find(original)
    alone = Path(shutil.copytree(original / VARIANT, tmp_path / "mine"))
    base = find(alone, parts_path=str(original))
    assert (base.dit, base.condition, base.vae) == (alone, alone, original / "vae")
    assert find(NANO / "transformer") == find(NANO)


def test_parts_path_goes_before_siblings(original, tmp_path):
    parts = base_model(tmp_path / "parts", seed=1)
    base = find(original, parts_path=str(parts))
    assert (base.dit, base.vae, base.tokenizer.parent) == (original / VARIANT, parts / "vae", parts)


def test_environment_names_the_default_folder(original, monkeypatch):
    monkeypatch.setenv("ACESTEP_MODELS", str(original))
    assert basemodel.find(None, variant=VARIANT, repo=REPO) == find(original)
    monkeypatch.delenv("ACESTEP_MODELS")
    with pytest.raises(BaseModelError, match=rf"hf download {REPO} --local-dir .*model\.path="):
        basemodel.find(None, variant=VARIANT, repo=REPO)


def test_several_variants_are_listed(original, tmp_path):
    for name in ("acestep-v15-turbo", "acestep-v15-my-finetune"):
        shutil.copytree(original / VARIANT, tmp_path / name)
    with pytest.raises(BaseModelError, match="acestep-v15-my-finetune, acestep-v15-turbo but not acestep-v15-sft"):
        basemodel.pick_variant(tmp_path, "acestep-v15-sft")
    assert basemodel.pick_variant(tmp_path, "acestep-v15-my-finetune") == tmp_path / "acestep-v15-my-finetune"


@pytest.mark.parametrize("path", ["/no/such/folder", "one word", "a/b/c", r"C:\models\turbo"])
def test_missing_path(path):
    with pytest.raises(BaseModelError, match="is neither a folder nor a hub id") as caught:
        find(path)
    assert path in str(caught.value)


def test_folder_without_a_model(tmp_path):
    with pytest.raises(BaseModelError, match=f"holds no ACE-Step model: expected {VARIANT}/"):
        find(tmp_path)


OFFLINE = """
import json, sys
from acestep_lora import basemodel
answers = []
for path, variant in json.load(sys.stdin):
    try:
        base = basemodel.find(path, variant=variant, repo=path)
        answers.append({"vae": str(base.vae), "text": str(base.text_encoder), "tokenizer": str(base.tokenizer)})
    except basemodel.BaseModelError as error:
        answers.append({"error": str(error)})
print(json.dumps(answers))
"""


def offline(hub: Path, *requests: tuple[str, str]) -> list[dict]:
    """What `find` answers in a process of its own without network, `hub` being its hub cache."""
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(hub), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE], input=json.dumps(requests), env=env, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def publish(hub: Path, repo: str, source: Path) -> Path:
    """Put a folder into a hub cache as the snapshot of a repository."""
    home = hub / f"models--{repo.replace('/', '--')}"
    (home / "refs").mkdir(parents=True)
    (home / "refs/main").write_text("0" * 40, encoding="utf-8")
    return Path(shutil.copytree(source, home / "snapshots" / ("0" * 40)))


def test_hub_ids(original, golden_variant, tmp_path):
    """Without network: one sentence with the command. From the hub cache: whole repositories, and missing parts."""
    empty, hub = tmp_path / "empty", tmp_path / "hub"
    released = publish(hub, REPO, original)
    publish(hub, "someone/finetune", original / VARIANT)
    alone = (str(golden_variant), VARIANT)
    unknown, no_parts = offline(empty, ("someone/finetune", VARIANT), alone)
    assert "`hf download someone/finetune --local-dir models/finetune`" in unknown["error"]
    assert f"{golden_variant.parent} has no VAE (vae/); " in no_parts["error"]
    assert f"`hf download {REPO} --local-dir models/Ace-Step1.5`" in no_parts["error"]
    assert all(answer["error"].count("\n") == 0 for answer in (unknown, no_parts))
    text = str(released / "Qwen3-Embedding-0.6B")
    expected = {"vae": str(released / "vae"), "text": text, "tokenizer": text}
    requests = (REPO, VARIANT), ("someone/finetune", VARIANT), alone, (str(NANO / "transformer"), VARIANT)
    *found, nano = offline(hub, *requests)
    assert found == [expected] * 3
    assert nano["vae"] == str(NANO / "vae")


def test_part_that_nobody_publishes(original, tmp_path):
    """A lone diffusers transformer has no condition encoder, nor has the released repository."""
    publish(tmp_path / "hub", REPO, original)
    alone = shutil.copytree(NANO / "transformer", tmp_path / "mine" / "transformer")
    (answer,) = offline(tmp_path / "hub", (str(alone), VARIANT))
    assert "has no condition encoder (condition_encoder/)" in answer["error"]
    assert "model.parts_path" in answer["error"]


# ---------------------------------------------------------------- reading weights


def classes(base: basemodel.BaseModel) -> dict[str, torch.nn.Module]:
    tokenizer, detokenizer = basemodel.load_audio_tokenizer(base, torch.float32, "cpu")
    return {
        "decoder": load_dit(base.dit),
        "encoder": basemodel.load_condition_encoder(base, torch.float32, "cpu"),
        "tokenizer": tokenizer,
        "detokenizer": detokenizer,
    }


def test_an_upstream_checkpoint_is_read_as_it_was_written(original, tmp_path):
    """Every tensor: reading, writing by the inverse names and reading again. Sizes are unlike any released model's."""
    first = classes(find(original))
    silence = torch.load(original / VARIANT / "silence_latent.pt", weights_only=True)
    again = write_variant(tmp_path / "again", first, CONFIG, silence)
    files = [load_file(folder / "model.safetensors") for folder in (original / VARIANT, again)]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    assert torch.equal(first["encoder"].silence_latent, silence.transpose(1, 2))
    assert first["decoder"].condition_embedder.weight.shape == (96, 64)
    assert first["tokenizer"].quantizer.codebook_size == 75
    assert not any(parameter.requires_grad for module in first.values() for parameter in module.parameters())


def test_diffusers_layout_is_read_like_diffusers_does(nano):
    for name, module in classes(nano).items():
        folder = {"decoder": nano.dit, "encoder": nano.condition}.get(name) or getattr(nano, f"audio_{name}", None)
        weights = load_file((folder or nano.detokenizer) / "diffusion_pytorch_model.safetensors")
        state = module.state_dict()
        assert weights.keys() == state.keys()
        assert all(torch.equal(weights[key].float(), state[key]) for key in weights)


def test_shards(variant, golden_variant):
    state = load_file(variant / "model.safetensors")
    (variant / "model.safetensors").unlink()
    index = {name: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, name in enumerate(sorted(state))}
    for file in set(index.values()):
        save_file({name: state[name] for name in state if index[name] == file}, variant / file)
    (variant / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}), encoding="utf-8")
    whole, sharded = load_dit(golden_variant).state_dict(), load_dit(variant).state_dict()
    assert all(torch.equal(whole[name], sharded[name]) for name in whole)
    parts = basemodel.BaseModel(*[variant] * 7)
    assert torch.equal(basemodel.constants(parts)[0], state["null_condition_emb"].flatten())
    (variant / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(BaseModelError, match="incomplete: model-00002-of-00002.safetensors is named in"):
        load_dit(variant)


SPOILT = {
    "left over": (lambda state: state | {"decoder.extra.weight": torch.zeros(1)}, "1 keys, first extra.weight"),
    "missing": (lambda state: {k: v for k, v in state.items() if k != "decoder.norm_out.weight"}, "norm_out.weight"),
    "wrong shape": (
        lambda state: state | {"decoder.norm_out.weight": torch.zeros(65)},
        r"norm_out.weight is \[65\], expected \[64\]",
    ),
}


@pytest.mark.parametrize("spoil, message", SPOILT.values(), ids=SPOILT)
def test_keys_and_shapes_must_fit(variant, spoil, message):
    save_file(spoil(load_file(variant / "model.safetensors")), variant / "model.safetensors")
    with pytest.raises(BaseModelError, match=message):
        load_dit(variant)


@pytest.mark.parametrize(
    "name, message",
    [
        ("model.safetensors", "holds no .safetensors weights"),
        ("config.json", "has no config.json, so it is not a model folder"),
        ("silence_latent.pt", "has no silence_latent.pt: get it with `hf download"),
    ],
)
def test_missing_files(variant, name, message):
    (variant / name).unlink()
    with pytest.raises(BaseModelError, match=message):
        basemodel.build(AceStepConditionEncoder, variant, "encoder", torch.float32, "cpu")


def test_truncated_weights(variant):
    file = variant / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(BaseModelError, match="model.safetensors is damaged, download it again: .*"):
        load_dit(variant)


def test_config_that_is_no_json(variant):
    (variant / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(BaseModelError, match="config.json cannot be used"):
        find(variant)


def test_silence_may_lie_with_another_variant(variant, golden_variant):
    os.replace(variant / "silence_latent.pt", variant.parent / "silence_latent.pt")
    expected = torch.load(golden_variant / "silence_latent.pt", weights_only=True)[0].T.float()
    assert torch.equal(basemodel.constants(basemodel.BaseModel(*[variant] * 7))[1], expected)


def test_encoder_sizes_may_be_null(variant, golden_variant):
    """Some XL-like files spell the encoder's sizes as null where they are the decoder's."""
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    edit(variant, **{f"encoder_{name}": None for name in names})
    for folder in (variant, golden_variant):
        assert len(classes(basemodel.BaseModel(*[folder] * 7))) == len(COMPONENTS)
    assert load_dit(variant).condition_embedder.in_features == 64


def test_rope_theta_may_be_in_rope_parameters(variant):
    edit(variant, rope_theta=..., rope_parameters={"rope_theta": 5e5, "rope_type": "default"})
    assert load_dit(variant).rope_theta == 5e5
    edit(variant, rope_parameters=None)
    assert load_dit(variant).rope_theta == 1e6


def test_dtype_is_the_callers(variant):
    assert load_dit(variant, dtype=torch.bfloat16).norm_out.weight.dtype == torch.bfloat16
    state = {name: value.bfloat16() for name, value in load_file(variant / "model.safetensors").items()}
    save_file(state, variant / "model.safetensors")
    assert {p.dtype for p in load_dit(variant).parameters()} == {torch.float32}


def test_timbre_token_follows_the_official_class(variant):
    base = basemodel.BaseModel(*[variant] * 7)
    assert not base.uses_timbre_token()
    edit(variant, auto_map={"AutoModel": "modeling_acestep_v15_xl_turbo.AceStepConditionGenerationModel"})
    assert base.uses_timbre_token()
    hooked = basemodel.load_condition_encoder(base, torch.float32, "cpu").timbre_encoder.embed_tokens._forward_hooks
    assert len(hooked) == 1
    plain = basemodel.load_condition_encoder(base, torch.float32, "cpu", timbre_token=False)
    assert not plain.timbre_encoder.embed_tokens._forward_hooks


def test_vae_and_transformer_must_belong_together(original):
    find(original).check()
    stranger = basemodel.BaseModel(**{**vars(find(original)), "vae": NANO / "vae"})
    with pytest.raises(BaseModelError, match="makes 48 latent channels, .* takes 8"):
        stranger.check()


def test_base_without_audio_tokenizer(nano):
    with pytest.raises(BaseModelError, match="audio_tokenizer/, which conditioning.lm_hints needs"):
        basemodel.load_audio_tokenizer(
            basemodel.BaseModel(**{**vars(nano), "audio_tokenizer": None}), torch.float32, "cpu"
        )


def test_nothing_is_unpickled(variant, tmp_path):
    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save(Code(), variant / "silence_latent.pt")
    with pytest.raises(BaseModelError, match="silence_latent.pt .* it holds something else than tensors"):
        basemodel.constants(basemodel.BaseModel(*[variant] * 7))
    assert not (tmp_path / "executed").exists()


# ---------------------------------------------------------------- hashes


def test_hashes_name_the_weights(nano, tmp_path):
    """Each hash changes with its own files alone."""
    copy = find(shutil.copytree(NANO, tmp_path / "nano"))

    def hashes() -> tuple[str, str, str]:
        store = FileHashes(tmp_path / "hashes.json")
        return copy.vae_hash(store), copy.condition_hash(store), copy.dit_hash(store)

    before = hashes()
    store = FileHashes(tmp_path / "other.json")
    assert before == (nano.vae_hash(store), nano.condition_hash(store), nano.dit_hash(store))
    for i, folder in enumerate((copy.vae, copy.text_encoder, copy.dit)):
        file = next(folder.glob("*.safetensors"))
        state = load_file(file)
        state[min(state)] += 1
        save_file(state, file)
        after = hashes()
        assert [a != b for a, b in zip(after, before, strict=True)] == [j == i for j in range(3)]
        before = after
    tokenizer = copy.tokenizer / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text(encoding="utf-8") + " ", encoding="utf-8")
    assert hashes()[1] != before[1]


def test_hashes_are_remembered(tmp_path):
    """The stored digest is used while size and time stay, and not after."""
    file, store = tmp_path / "a.bin", tmp_path / "hashes.json"
    file.write_bytes(b"one")
    hashes = FileHashes(store)
    first = hashes.file(file)
    hashes.save()
    stat = file.stat()
    file.write_bytes(b"two")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert FileHashes(store).file(file) == first
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert FileHashes(store).file(file) != first
    store.write_text("[rubbish", encoding="utf-8")
    assert FileHashes(store).known == {}
