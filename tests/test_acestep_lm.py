"""The 5 Hz LM, from audio to fields: the real classes with random weights, which say nonsense in the right form."""

import json
import re
from dataclasses import replace

import pytest
import soundfile
import torch
import yaml
from builders import NANO, VARIANT, base_model, write_songs
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, DynamicCache, Qwen3Config, Qwen3ForCausalLM

from acestep_lora import basemodel
from acestep_lora.annotate import acestep_lm
from acestep_lora.annotate.acestep_lm import AceStepLM, unfold
from acestep_lora.annotate.provider import Provider, ProviderDown, ProviderError
from acestep_lora.data.fields import LANGUAGES
from acestep_lora.data.track import scan
from acestep_lora.hardware import Hardware

CODES, POOL = 75, 4  # of the base model in builders.py: kinds of codes, latent frames in one
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_lm(folder, codes=CODES, **config):
    """A Qwen3 with the tokens of audio codes, as acestep-5Hz-lm has them."""
    tokenizer = AutoTokenizer.from_pretrained(NANO / "tokenizer")
    special = ["<|im_start|>", "<|im_end|>", *(f"<|audio_code_{i}|>" for i in range(codes))]
    tokenizer.add_tokens(special, special_tokens=True)
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        options = {"vocab_size": len(tokenizer) + 5, "initializer_range": 0.5, "tie_word_embeddings": True} | config
        lm = Qwen3ForCausalLM(Qwen3Config(**sizes, **heads, **options))
    lm.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    lm.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True, scope="module")
def brief():
    """Random weights never come to an end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(acestep_lm, "MAX_TOKENS", {"caption": 40, "genres": 20, "language": 8})
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return base_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def tracks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("songs")
    write_songs(folder, 24000, count=2, seconds=2.0)
    plain, sung = scan(folder).tracks
    return [plain, replace(sung, lyrics="la la la", bpm=92, keyscale="F# minor")]


@pytest.fixture(scope="module")
def provider(base, tmp_path_factory):
    return AceStepLM(str(write_lm(tmp_path_factory.mktemp("lm"))), str(base), VARIANT, Hardware("cpu"))


@pytest.fixture
def lm(provider, tracks, monkeypatch):
    """lm(favour) -> the provider, whose LM likes the tokens of `favour(what it is writing)` best, and what it reads."""
    provider._listener or provider.annotate(tracks[0])
    listener = provider._listener
    generate, texts = listener.lm.generate, []

    def make(favour=lambda _text: []):
        def scripted(prompt, logits_processor, **options):
            def prefer(sequence, scores):
                scores[0, favour(listener.tokenizer.decode(sequence[0, prompt.shape[1] :]))] += 1e4
                return scores

            texts.append(generate(prompt, logits_processor=[prefer, *logits_processor], **options))
            return texts[-1]

        monkeypatch.setattr(listener.lm, "generate", scripted)
        return provider, lambda: listener.tokenizer.decode(texts[-1][0, :-1])

    return make


def expected_codes(base, song) -> str:
    """The whole clip at once through VAE and 5 Hz tokenizer."""
    model = basemodel.find(str(base), variant=VARIANT, repo="")
    vae, (tokenizer, _) = (
        load(model, torch.float32, "cpu") for load in (basemodel.load_vae, basemodel.load_audio_tokenizer)
    )
    samples, _ = soundfile.read(song, dtype="float32")
    silence = torch.load(base / VARIANT / "silence_latent.pt", weights_only=True)[0].T
    with torch.inference_mode():
        latents = vae.encode(torch.from_numpy(samples.T)[None]).latent_dist.mean[0].T
        latents = torch.cat([latents, silence[: -len(latents) % POOL]])
        _, codes = tokenizer(latents.reshape(1, -1, POOL, latents.shape[-1]))
    return "".join(f"<|audio_code_{code}|>" for code in codes.flatten().tolist())


def test_the_lm_reads_what_it_was_trained_on(lm, tracks, base):
    """Its chat format, the song's codes, and YAML lines in which all that is known stands already."""
    provider, text = lm()
    assert isinstance(provider, Provider)
    for track in tracks:
        answer = provider.annotate(track)
        assert answer == provider.annotate(track)
        system = (
            "# Instruction\nUnderstand the given musical conditions and describe the audio semantics accordingly:\n\n"
        )
        prompt = (
            f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{expected_codes(base, track.path)}<|im_end|>\n"
        )
        head, _, lines = text().partition("<|im_start|>assistant\n")
        assert head == prompt
        known = {"bpm": track.bpm, "keyscale": track.keyscale} if track.bpm else {}
        keys = re.findall(r"^(\w+):", lines, re.MULTILINE)
        assert keys == sorted({"caption", "duration", "genres", *known, *(["language"] if track.bpm else [])})
        assert all(f"\n{key}: {value}\n" in lines for key, value in known.items())
        assert f"\nduration: {int(soundfile.info(track.path).duration)}\n" in lines
        assert answer.values.keys() - {"language"} == {"caption", "genre"}


def test_a_whole_answer_is_understood(lm, tracks):
    """Folded and quoted lines as YAML writes them; the next key, which the LM goes on with, ends a value."""
    script = iter(
        (
            " 'Lofi: a slow, warm piano over the\n  drums, and it''s calm.'\nduration: 9",
            " lofi, ambient\nkeyscale",
            " ja\n",
        )
    )
    tokenizer, wanted = lm()[0]._listener.tokenizer, []

    def favour(text):
        if not text:
            wanted[:] = tokenizer(next(script), add_special_tokens=False).input_ids
        written = next(n for n in range(len(wanted)) if tokenizer.decode(wanted[:n]) == text)
        return wanted[written]

    provider, text = lm(favour)
    answer = provider.annotate(tracks[1])
    caption = "Lofi: a slow, warm piano over the drums, and it's calm."
    assert answer.values == {"caption": caption, "genre": "lofi, ambient", "language": "ja"}
    assert "calm.'\nduration: 2\ngenres: lofi, ambient\nkeyscale: F# minor\nlanguage: ja" in text()


@pytest.mark.parametrize(
    "wanted", ["<|im_end|>", "<|endoftext|>", "<think>", "</think>", "<|audio_code_7|>", "\n", " "]
)
def test_fields_are_well_formed_whatever_the_lm_wants(lm, tracks, wanted):
    """It would rather end its turn, think, play or say nothing."""
    tokenizer = lm()[0]._listener.tokenizer
    ids = tokenizer(wanted, add_special_tokens=False).input_ids
    provider, text = lm(lambda _text: ids)
    answer = provider.annotate(tracks[1])
    assert answer.values["caption"] and "<|" not in answer.values["caption"]
    lines = text().partition("<think>\n")[2]
    assert re.findall(r"^\w+:", lines, re.MULTILINE) == "bpm: caption: duration: genres: keyscale: language:".split()
    assert not re.search(r"<\|im_end|<\|audio|think>|endoftext", lines)
    assert lines.rpartition("language: ")[2].strip() in LANGUAGES


def test_the_cache_changes_nothing(lm, tracks):
    provider, _ = lm()
    listener, written = provider._listener, []
    complete = listener._complete

    def both(ids, cache, key):
        value = complete(ids, cache, key)
        written.append(key)
        assert value == complete(ids, DynamicCache(), key)
        return value

    listener._complete = both
    provider.annotate(tracks[1])
    del listener._complete
    assert written == ["caption", "genres", "language"]


def test_a_checkpoint_without_head_is_read(provider, tracks, base, tmp_path):
    """Weights saved as Qwen3Model, names without `model.`, as some releases have them."""
    write_lm(tmp_path)
    Qwen3ForCausalLM.from_pretrained(tmp_path).model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["Qwen3Model"]
    again = AceStepLM(str(tmp_path), str(base), VARIANT, Hardware("cpu"))
    assert again.annotate(tracks[0]) == provider.annotate(tracks[0])


def test_it_is_chosen_by_a_word(provider, tracks, base, configure):
    """captioner=acestep_lm takes the VAE and the 5 Hz tokenizer of the chosen model."""
    words = ["model=turbo", f"model.path={base}", "captioner=acestep_lm", f"captioner.path={provider.path}"]
    chosen = instantiate(configure("annotate", "tempo_key=none", "hardware=cpu", *words).captioner)
    assert chosen.annotate(tracks[0]) == provider.annotate(tracks[0])


def test_code_in_a_checkpoint_is_not_run(base, tracks, tmp_path):
    write_lm(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.Evil"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    assert AceStepLM(str(tmp_path), str(base), VARIANT, Hardware("cpu")).annotate(tracks[0]).values


def damage(folder, how):
    if how == "nothing there":
        return folder / "nowhere"
    codes = {"few codes": CODES - 1, "many codes": 4 * CODES}.get(how, CODES)
    write_lm(folder, codes, tie_word_embeddings=how != "head")
    weights = folder / "model.safetensors"
    if how == "head":  # as if the output layer had never been saved
        Qwen3ForCausalLM.from_pretrained(folder).model.save_pretrained(folder)
    elif how == "no template":
        (folder / "chat_template.jinja").unlink()
    elif how == "damaged":
        weights.write_bytes(weights.read_bytes()[:999])
    elif how == "pickle":
        torch.save(Qwen3ForCausalLM.from_pretrained(folder).state_dict(), folder / "pytorch_model.bin")
        weights.unlink()
    return folder


@pytest.mark.parametrize(
    "how, reason",
    [
        ("nothing there", "no folder or hub id"),
        ("few codes", "knows 74 audio codes and acestep-v15-turbo makes 75"),
        ("many codes", "knows 300 audio codes"),
        ("head", "1 weights lack, first lm_head.weight"),
        ("no template", "has no chat template"),
        ("damaged", "no folder or hub id"),
        ("pickle", "no folder or hub id"),
    ],
)
def test_what_is_no_5hz_lm_is_refused(base, tracks, tmp_path, how, reason):
    lm = AceStepLM(str(damage(tmp_path, how)), str(base), VARIANT, Hardware("cpu"))
    with pytest.raises(ProviderDown, match=reason):
        lm.annotate(tracks[0])


def test_a_base_model_is_needed(provider, tracks, tmp_path):
    lm = AceStepLM(provider.path, str(tmp_path), VARIANT, Hardware("cpu"))
    with pytest.raises(ProviderDown, match="holds no ACE-Step model"):
        lm.annotate(tracks[0])


def test_silence_is_not_described(provider, tracks, tmp_path):
    soundfile.write(tmp_path / "silence.wav", torch.zeros(24000, 2).numpy(), 24000)
    with pytest.raises(ProviderError, match="silent"):
        provider.annotate(replace(tracks[0], path=tmp_path / "silence.wav"))


@settings(deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Zl", "Zp"]), max_size=300))
def test_what_yaml_folds_is_unfolded(text):
    text = " ".join(text.split())
    written = yaml.safe_dump({"caption": text}, allow_unicode=True)
    if not re.match(r"caption: [>|]", written):
        assert unfold(written.partition(":")[2]) == text
