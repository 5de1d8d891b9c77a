"""Generation is diffusers' own, with adapters at their strengths, the model's own settings and a negative prompt."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import librosa
import numpy as np
import pytest
import soundfile
import torch
from diffusers import AceStepPipeline
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance
from matplotlib.image import imread
from peft import LoHaConfig, LoraConfig, OFTConfig
from safetensors.torch import load_file, save_file

from acestep_lora import generation
from acestep_lora.adapters import Adapter, AdapterError, state
from acestep_lora.dit import load_dit
from acestep_lora.errors import UserError
from acestep_lora.flow import euler_step
from acestep_lora.generation import Request
from acestep_lora.naming import to_diffusers, to_upstream

SONG = Request(
    prompt="lofi, warm piano",
    lyrics="[Verse 1]\nかみの あかり",
    duration=2.0,
    bpm=92,
    keyscale="D minor",
    timesignature="3",
    language="ja",
    steps=3,
)
KINDS = {
    "lora": partial(LoraConfig, r=4, lora_alpha=8),
    "loha": partial(LoHaConfig, r=4, alpha=4),
    "oft": partial(OFTConfig, r=4, oft_block_size=0),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """So small a model only loses time to the second thread, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pipeline(nano):
    return generation.load_pipeline(nano, torch.float32, "cpu")


@pytest.fixture
def turbo(nano):
    """nano as if it were a turbo model, which is sampled without guidance."""
    pipeline = generation.load_pipeline(nano, torch.float32, "cpu")
    pipeline.is_turbo = True
    return pipeline


@pytest.fixture(scope="module")
def adapters(nano, tmp_path_factory) -> dict[str, str]:
    """Adapters with random weights, by kind: their folders, as PEFT writes them."""
    folders = {}
    for seed, (name, kind) in enumerate([*KINDS.items(), ("other", "lora")]):
        dit = load_dit(nano.dit)
        config = KINDS[kind] if isinstance(kind, str) else kind
        Adapter(config, r=4, alpha=8).inject(dit)
        torch.manual_seed(seed)
        for parameter in dit.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(0, 0.3)
        folder = tmp_path_factory.mktemp(name)
        weights = {f"base_model.model.{to_upstream(key)}": value for key, value in state(dit).items()}
        save_file(weights, folder / "adapter_model.safetensors")
        dit.peft_config["default"].save_pretrained(folder)
        folders[name] = str(folder)
    return folders


def adapted(nano, *paths_and_scales) -> list[torch.Tensor]:
    pipeline = generation.load_pipeline(nano, torch.float32, "cpu")
    paths, scales = paths_and_scales[::2], paths_and_scales[1::2]
    generation.add_adapters(pipeline, paths, scales)
    return generation.generate(pipeline, SONG)


@pytest.fixture(scope="module")
def plain(pipeline) -> torch.Tensor:
    return generation.generate(pipeline, SONG)[0]


# ---------------------------------------------------------------- the same as diffusers


def test_audio_is_exactly_diffusers_own(pipeline, plain, nano):
    theirs = AceStepPipeline.from_pretrained(nano.dit.parent)
    expected = theirs(
        prompt=SONG.prompt,
        lyrics=SONG.lyrics,
        audio_duration=2.0,
        vocal_language="ja",
        num_inference_steps=3,
        guidance_scale=1.0,
        shift=3.0,
        bpm=92,
        keyscale="D minor",
        timesignature="3",
        generator=torch.Generator().manual_seed(1),
    ).audios[0]
    assert plain.shape == (2, 2 * pipeline.sample_rate) and plain.std() > 0.01
    assert torch.equal(plain, expected)


def test_each_seed_is_a_clip_of_its_own(pipeline, plain):
    first, second = generation.generate(pipeline, replace(SONG, seeds=[1, 2]))
    assert torch.equal(first, plain)
    assert (first - second).abs().max() > 0.1


@pytest.mark.parametrize(
    "name, value",
    {"bpm": None, "keyscale": "", "timesignature": "", "language": "en", "lyrics": "la", "shift": 1.0}.items(),
)
def test_every_field_is_heard(pipeline, plain, name, value):
    clip = generation.generate(pipeline, replace(SONG, **{name: value}))[0]
    assert (clip - plain).abs().max() > 1e-4


def test_instrumental_ignores_the_lyrics(pipeline, plain):
    clips = [
        generation.generate(pipeline, replace(SONG, **fields))[0]
        for fields in (
            {"instrumental": True},
            {"lyrics": "", "language": "unknown"},
            {"lyrics": "[Instrumental]", "language": "unknown"},
        )
    ]
    assert torch.equal(clips[0], clips[1]) and torch.equal(clips[1], clips[2])
    assert (clips[0] - plain).abs().max() > 1e-4


def test_one_dtype_throughout(nano):
    """A text encoder of another dtype than the condition encoder's fails; ours are all read in the one asked for."""
    pipeline = generation.load_pipeline(nano, torch.bfloat16, "cpu")
    parts = (pipeline.text_encoder, pipeline.condition_encoder, pipeline.transformer, pipeline.vae)
    dtypes = {value.dtype for part in parts for value in part.state_dict().values() if value.is_floating_point()}
    assert dtypes == {torch.bfloat16}
    clip = generation.generate(pipeline, SONG)[0]
    assert clip.dtype == torch.float32 and clip.isfinite().all() and clip.std() > 0.01
    pipeline.text_encoder.float()
    with pytest.raises(RuntimeError, match="dtype"):
        generation.generate(pipeline, SONG)


# ---------------------------------------------------------------- adapters


@pytest.mark.parametrize("kind", ["lora", "loha"])
def test_strength_zero_is_the_base_model(nano, adapters, plain, kind):
    assert torch.equal(adapted(nano, adapters[kind], 0.0)[0], plain)
    assert (adapted(nano, adapters[kind], 1.0)[0] - plain).abs().max() > 0.01


def test_two_adapters_add_up_at_their_strengths(nano, adapters, plain):
    pipeline = generation.load_pipeline(nano, torch.float32, "cpu")
    for kind, scale in (("lora", 0.5), ("other", 0.75)):
        factors = load_file(Path(adapters[kind]) / "adapter_model.safetensors")
        for name in [name for name in factors if "lora_A" in name]:
            module = to_diffusers(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
            update = 8 / 4 * factors[name.replace("lora_A", "lora_B")] @ factors[name]  # alpha / r
            pipeline.transformer.get_submodule(module).weight.data += scale * update
    merged = generation.generate(pipeline, SONG)[0]
    both = adapted(nano, adapters["lora"], 0.5, adapters["other"], 0.75)[0]
    torch.testing.assert_close(both, merged, atol=1e-4, rtol=0)
    for one in ("lora", "other"):
        assert (adapted(nano, adapters[one], 1.0)[0] - both).abs().max() > 0.01


def test_adapter_without_a_strength_is_refused_one(nano, adapters, plain):
    assert (adapted(nano, adapters["oft"], 1.0)[0] - plain).abs().max() > 0.01
    with pytest.raises(AdapterError, match="OFT.*adapter.scale must be 1, got 0.5"):
        adapted(nano, adapters["oft"], 0.5)


# ---------------------------------------------------------------- guidance


def test_turbo_models_run_without_guidance(pipeline, plain, turbo):
    assert not pipeline.is_turbo
    assert torch.equal(generation.generate(turbo, SONG)[0], plain)
    assert torch.equal(generation.generate(turbo, replace(SONG, guidance_scale=7.0))[0], plain)
    assert (generation.generate(pipeline, replace(SONG, guidance_scale=7.0))[0] - plain).abs().max() > 0.01


def condition(pipeline, prompt: str, lyrics: str, language: str, **metas) -> torch.Tensor:
    """The condition states the pipeline gives its transformer for a prompt."""
    caught = []
    hook = pipeline.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: caught.append(kwargs["encoder_hidden_states"]), with_kwargs=True
    )
    pipeline(
        prompt, lyrics, audio_duration=2.0, vocal_language=language, num_inference_steps=1, guidance_scale=1.0, **metas
    )
    hook.remove()
    return caught[0]


@torch.no_grad()
def test_negative_prompt_takes_the_place_of_the_null_condition(pipeline):
    """Against the sampler written out, each condition at its own length."""
    request = replace(SONG, negative_prompt="harsh metal, distorted guitars", guidance_scale=5.0, shift=1.0)
    metas = {"bpm": 92, "keyscale": "D minor", "timesignature": "3"}
    wanted = condition(pipeline, SONG.prompt, SONG.lyrics, "ja", **metas)
    unwanted = condition(pipeline, request.negative_prompt, "[Instrumental]", "unknown")
    assert wanted.shape[1] != unwanted.shape[1]
    frames, channels = int(2 * pipeline.latents_per_second), pipeline.transformer.config.audio_acoustic_hidden_dim
    x = torch.randn(1, frames, channels, generator=torch.Generator().manual_seed(1))
    silence = pipeline.condition_encoder.silence_latent[:, :frames]
    context, momentum = torch.cat([silence, torch.ones_like(silence)], -1), MomentumBuffer(-0.75)
    times = [1.0, 2 / 3, 1 / 3, 0.0]
    for t, following in zip(times, times[1:], strict=False):
        now = torch.tensor([t])
        toward, away = (pipeline.transformer(x, now, now, states, context).sample for states in (wanted, unwanted))
        v = normalized_guidance(toward, away, 4.0, momentum, 0.0, 2.5, use_original_formulation=True, norm_dim=(1,))
        x = euler_step(x, v, t, following)
    audio = pipeline.vae.decode(x.transpose(1, 2)).sample[0]
    audio = audio / audio.abs().max() * 10 ** (-1 / 20)
    torch.testing.assert_close(generation.generate(pipeline, request)[0], audio, atol=1e-4, rtol=0)


def test_leading_away_from_what_is_asked_for_is_no_guidance(pipeline):
    request = Request(SONG.prompt, duration=2.0, steps=3, guidance_scale=7.0, negative_prompt=SONG.prompt)
    unguided = generation.generate(pipeline, replace(request, negative_prompt="", guidance_scale=1.0))[0]
    assert torch.equal(generation.generate(pipeline, request)[0], unguided)
    other = generation.generate(pipeline, replace(request, negative_prompt="harsh metal"))[0]
    assert (other - unguided).abs().max() > 0.01


def test_pipeline_forgets_the_negative_prompt(pipeline):
    request = replace(SONG, guidance_scale=7.0)
    before = generation.generate(pipeline, request)[0]
    generation.generate(pipeline, replace(request, negative_prompt="harsh metal"))
    with pytest.raises(RuntimeError), generation.negative(pipeline, replace(request, negative_prompt="harsh")):
        raise RuntimeError
    assert torch.equal(generation.generate(pipeline, request)[0], before)


def test_negative_prompt_without_guidance_is_refused(turbo, pipeline):
    with pytest.raises(UserError, match="'harsh metal' has no effect, as turbo models run without guidance"):
        generation.generate(turbo, replace(SONG, negative_prompt="harsh metal", guidance_scale=7.0))
    with pytest.raises(UserError, match="guidance_scale=1 is no guidance"):
        generation.generate(pipeline, replace(SONG, negative_prompt="harsh metal"))


# ---------------------------------------------------------------- files


def test_write_compares_with_the_base_model(nano, adapters, plain, tmp_path):
    pipeline = generation.load_pipeline(nano, torch.float32, "cpu")
    written = generation.write(pipeline, SONG, [adapters["lora"]], [1.0], tmp_path / "new", "flac", compare=True)
    assert {path.name for path in written} == {"seed_1.flac", "seed_1_base.flac", "seed_1.png"}
    assert {path.name for path in (tmp_path / "new").iterdir()} == {path.name for path in written}
    base, rate = soundfile.read(tmp_path / "new/seed_1_base.flac")
    assert rate == pipeline.sample_rate and soundfile.info(tmp_path / "new/seed_1.flac").format == "FLAC"
    np.testing.assert_allclose(base.T, plain.numpy(), atol=1 / 32000)
    audio, _ = soundfile.read(tmp_path / "new/seed_1.flac")
    np.testing.assert_allclose(audio.T, adapted(nano, adapters["lora"], 1.0)[0].numpy(), atol=1 / 32000)


def test_spectrogram_shows_the_sound(tmp_path):
    rate = 16000
    sweep = torch.from_numpy(librosa.chirp(fmin=100, fmax=6000, sr=rate, duration=2.0)).expand(2, -1).float()
    silence = torch.zeros(2, 2 * rate)
    picture = imread(generation.write_spectrograms(tmp_path / "a.png", [{"sweep": sweep, "silence": silence}], rate))
    height, width = picture.shape[0], picture.shape[1]
    inside = picture[height // 10 : height * 5 // 6, :, :3].mean(-1)  # without title and axes
    sweep, silence = inside[:, width // 10 : width * 9 // 20], inside[:, width * 3 // 5 : width * 19 // 20]
    assert sweep[:, 0].argmax() > sweep[:, -1].argmax() + height // 4  # the pitch rises from left to right
    assert silence.std() < 0.01 < 0.1 < sweep.std()


def test_spectrograms_share_one_scale(tmp_path):
    noise = torch.from_numpy(np.random.default_rng(0).normal(0, 0.1, (2, 16000))).float()
    picture = imread(generation.write_spectrograms(tmp_path / "a.png", [{"loud": noise, "soft": noise / 100}], 16000))
    row = picture[picture.shape[0] // 2, :, :3].mean(-1)
    quarter = len(row) // 4
    assert row[quarter - 40 : quarter + 40].mean() > row[3 * quarter - 40 : 3 * quarter + 40].mean() + 0.1


# ---------------------------------------------------------------- generate.py


@pytest.fixture
def command(configure, tmp_path):
    """command("steps=2", ...) -> files that generate.py writes for the song above."""
    import generate

    def run(*overrides: str):
        quick = ["hardware=cpu", "prompt=lofi, warm piano", "duration=2", "steps=3", "guidance_scale=1", "bpm=92"]
        quick += ["keyscale=Dm", "timesignature=3/4", "language=ja-JP", f"lyrics={SONG.lyrics}"]
        return generate.generate(configure("generate", *quick, f"output_dir={tmp_path / 'out'}", *overrides))

    return run


def test_metas_are_brought_into_the_models_form(command, plain):
    audio, rate = soundfile.read(command()[0])
    np.testing.assert_allclose(audio.T, plain.numpy(), atol=1 / 32000)


def test_settings_that_are_not_given_are_the_models(configure):
    cfg = configure("generate", "model=base", "steps=12")
    assert (cfg.steps, cfg.shift, cfg.guidance_scale) == (12, 1.0, 7.0)


def test_lyrics_from_a_file_lose_their_time_stamps(command, plain, tmp_path):
    file, stamped = tmp_path / "song's text.lrc", "[ti:x]\n[00:01.00][Verse 1]\n[00:02.50]かみの あかり\n"
    file.write_text(stamped, encoding="utf-8")
    audio, _ = soundfile.read(command(f"lyrics=@{file}")[0])
    np.testing.assert_allclose(audio.T, plain.numpy(), atol=1 / 32000)


@pytest.mark.parametrize(
    "typed, said",
    [
        ("keyscale=H-dur", "keyscale: 'H-dur' is not a key"),
        ("bpm=1000", "bpm: 1000 is not a number from 30 to 300"),
        ("format=mp3", "format=mp3 must be wav or flac"),
        ("duration=0", "duration=0 and steps=3 must both be above 0"),
        ("lyrics=@nowhere.txt", "lyrics=@nowhere.txt is not a file"),
        ("adapter.scale=[1,0.5]", "one number, or one for each of 0 adapters"),
        ("adapter.path=nowhere", "adapter.path=nowhere does not exist"),
    ],
)
def test_bad_values_are_named(command, tmp_path, typed, said):
    with pytest.raises(UserError, match=said):
        command(typed)
    assert not (tmp_path / "out").exists()


def test_every_number_of_frames_can_be_generated(nano):
    """28 frames of 25 Hz, among others, are drawn a frame too long by the pipeline itself."""
    pipeline = generation.load_pipeline(nano, torch.float32, "cpu")
    for frames in (27, 28, 29):
        (clip,) = generation.generate(pipeline, Request(prompt="a bell", duration=(frames - 0.25) / 25, steps=1))
        assert clip.shape == (2, frames * 480)
