"""Transcribers against servers that answer like the real ones, and on tiny random models of the real classes."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import services
import soundfile
import torch
from omegaconf import OmegaConf
from services import SECRET, WRONG_KEY, chat, gemini, scribe, whisper
from transformers import Qwen2_5OmniThinkerForConditionalGeneration

from acestep_lora import cli
from acestep_lora.annotate import remote, transcribers
from acestep_lora.annotate.omni import Omni
from acestep_lora.annotate.provider import Line, Provider, ProviderDown, ProviderError
from acestep_lora.annotate.structure import Structure
from acestep_lora.annotate.transcribers import (
    AceStepTranscriber,
    GeminiTranscriber,
    Lrc,
    Scribe,
    WhisperAPI,
    WhisperLocal,
)
from acestep_lora.data.fields import INSTRUMENTAL, LANGUAGES
from acestep_lora.data.track import Track
from acestep_lora.hardware import Hardware

CPU = Hardware(accelerator="cpu")
SUNG = "Harbour lights aglow, wait for me below. Again!"
SAID = "# Languages\nen\n\n# Lyrics\n[Verse 1]\nHarbour lights aglow\n"
WRITTEN = json.dumps({"language": "en", "lyrics": "[Verse 1]\nHarbour lights aglow"})


@pytest.fixture(scope="module")
def track(tmp_path_factory) -> Track:
    path = tmp_path_factory.mktemp("songs") / "song.wav"
    soundfile.write(path, 0.1 * np.random.default_rng(0).standard_normal(16000), 16000)
    return Track(id="song.wav", path=path, lyrics="Harbour lights aglow\nwait for me below")


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("OPENAI_API_KEY", "GEMINI_API_KEY", "ELEVENLABS_API_KEY"):
        monkeypatch.setenv(name, SECRET)
    with services.serve() as found:
        yield found


def whisper_api(url: str, **options) -> WhisperAPI:
    return WhisperAPI(True, remote.OpenAI("whisper-1", base_url=f"{url}/v1", **options))


def scribe_api(url: str, **options) -> Scribe:
    return Scribe(True, remote.ElevenLabs("scribe_v2", base_url=url, **options))


def gemini_api(url: str, **options) -> GeminiTranscriber:
    return GeminiTranscriber(True, remote.Gemini("gemini-2.5-flash", base_url=url, **options), "Write down the lyrics.")


def acestep_api(url: str, **options) -> AceStepTranscriber:
    service = remote.OpenAI("acestep-transcriber", base_url=f"{url}/v1", **options)
    return AceStepTranscriber(True, service, "*Task* Transcribe\n<audio>")


def structure_api(url: str, **options) -> Structure:
    return Structure("openai", remote.OpenAI("gpt", base_url=f"{url}/v1", **options), "Sections?", True)


def structure_gemini(url: str, **options) -> Structure:
    return Structure("gemini", remote.Gemini("gemini", base_url=url, **options), "Sections?", True)


SECTIONS = json.dumps({"sections": [{"line": 1, "name": "Verse 1"}]})
# provider, a good answer, whose way to refuse a key, the header that carries it
APIS = {
    "whisper_api": (whisper_api, whisper(SUNG), "openai", "authorization"),
    "elevenlabs": (scribe_api, scribe(SUNG), "elevenlabs", "xi-api-key"),
    "gemini": (gemini_api, gemini(WRITTEN), "gemini", "x-goog-api-key"),
    "acestep_transcriber": (acestep_api, chat(SAID), "openai", "authorization"),
    "structure openai": (structure_api, chat(SECTIONS), "openai", "authorization"),
    "structure gemini": (structure_gemini, gemini(SECTIONS), "gemini", "x-goog-api-key"),
}
every_api = pytest.mark.parametrize("make, good, refusal, header", APIS.values(), ids=APIS)


# ---------------------------------------------------------------- what the APIs say


def test_whisper_api_gives_lines_with_the_times_of_their_words(server, track):
    server.answers = [(200, whisper(SUNG))]
    answer = whisper_api(server.url).annotate(track)
    assert answer.values == {"lyrics": "Harbour lights aglow\nwait for me below\nAgain!", "language": "en"}
    assert answer.lines[1] == Line(1.2, 2.8, "wait for me below")
    assert answer.confidence == {"lyrics": pytest.approx(np.exp(-0.25), abs=1e-3)}
    path, _, body = server.requests[0]
    assert path == "/v1/audio/transcriptions"
    assert b"verbose_json" in body and b"word" in body and b"segment" in body and b'filename="song.mp3"' in body


def test_whisper_api_without_words_spreads_the_segment(server, track):
    server.answers = [(200, {"text": SUNG, "segments": [{"text": SUNG, "start": 10.0, "end": 20.0}]})]
    lines = whisper_api(server.url).annotate(track).lines
    assert [line.text for line in lines] == ["Harbour lights aglow", "wait for me below", "Again!"]
    assert lines[0].start == 10.0 and lines[-1].end == 20.0 and lines[0].end == lines[1].start


def test_what_whisper_makes_of_silence_is_dropped(server, track):
    server.answers = [(200, whisper("Thank you for watching!", no_speech_prob=0.95, avg_logprob=-1.4))]
    assert whisper_api(server.url).annotate(track).values == {"lyrics": INSTRUMENTAL}


def test_a_stuck_transcript_is_told(server, track):
    text = " ".join(["Oh baby baby."] * 8)
    server.answers = [(200, whisper(text))]
    assert "'Oh baby baby' is repeated" in whisper_api(server.url).annotate(track).problems[0]


def test_scribe_gives_words_with_times_and_no_applause(server, track):
    server.answers = [(200, scribe(SUNG))]
    answer = scribe_api(server.url).annotate(track)
    assert answer.values == {"lyrics": "Harbour lights aglow\nwait for me below\nAgain!", "language": "en"}
    assert answer.lines[0] == Line(0.0, 1.2, "Harbour lights aglow")
    assert answer.confidence == {"lyrics": pytest.approx(np.exp(-0.1), abs=1e-3), "language": 0.98}
    path, _, body = server.requests[0]
    assert path == "/v1/speech-to-text" and b"scribe_v2" in body


def test_gemini_gives_structured_output(server, track):
    server.answers = [(200, gemini(WRITTEN))]
    answer = gemini_api(server.url).annotate(track)
    assert answer.values == {"lyrics": "[Verse 1]\nHarbour lights aglow", "language": "en"} and answer.lines == ()
    path, _, body = server.requests[0]
    request = json.loads(body)
    assert path.endswith("/models/gemini-2.5-flash:generateContent")
    assert request["generationConfig"]["responseMimeType"] == "application/json"
    assert request["contents"][0]["parts"][0]["inlineData"].keys() == {"data", "mime_type"}


def test_acestep_transcriber_by_an_openai_compatible_server(server, track):
    server.answers = [(200, chat(SAID))]
    answer = acestep_api(server.url).annotate(track)
    assert answer.values == {"lyrics": "[Verse 1]\nHarbour lights aglow", "language": "en"}
    text, song = json.loads(server.requests[0][2])["messages"][0]["content"]
    assert text["text"] == "*Task* Transcribe\n" and song["input_audio"]["format"] == "mp3"
    server.answers = [(200, chat("I cannot listen to audio."))]
    with pytest.raises(ProviderError, match="instead of languages and lyrics"):
        acestep_api(server.url).annotate(track)


@pytest.mark.parametrize("make, wrap", [(structure_api, chat), (structure_gemini, gemini)])
def test_structure_is_asked_for_line_numbers(server, track, make, wrap):
    server.answers = [(200, wrap("Sure!\n```json\n" + SECTIONS + "\n```"))]
    assert make(server.url).annotate(track).values == {"lyrics": "[Verse 1]\n" + track.lyrics}
    assert b"2: wait for me below" in server.requests[0][2]
    server.answers = [(200, wrap(json.dumps({"sections": [{"line": 1, "name": "la la la"}]})))]
    with pytest.raises(ProviderError, match="'la la la' is no section"):
        make(server.url).annotate(track)


def test_a_server_without_structured_output_is_asked_in_words(server, track):
    server.answers = [(400, {"error": {"message": "response_format is not supported"}}), (200, chat(SECTIONS))]
    structure_api(server.url).annotate(track)
    first, second = (json.loads(body) for _, _, body in server.requests)
    assert first["response_format"]["json_schema"]["strict"] and "response_format" not in second
    assert "Answer in JSON alone" in second["messages"][0]["content"][-1]["text"]


# ---------------------------------------------------------------- what goes wrong on the way


@every_api
def test_after_429_it_is_tried_again(server, track, make, good, refusal, header):
    server.answers = [(429, {"error": {"message": "slow down"}}), (200, good)]
    assert make(server.url, retries=1).annotate(track).values["lyrics"]
    assert len(server.requests) == 2
    assert SECRET in server.requests[0][1][header]


@every_api
def test_a_lasting_429_stops_the_provider(server, track, make, good, refusal, header):
    server.answers = [(429, {"error": {"message": "quota"}})]
    with pytest.raises(ProviderDown, match="status 429"):
        make(server.url, retries=0).annotate(track)


@every_api
def test_a_timeout_is_this_songs_only(server, track, make, good, refusal, header):
    server.answers = [(200, good, 0.6)]
    with pytest.raises(ProviderError, match="did not answer within 0.3 s") as caught:
        make(server.url, retries=0, timeout=0.3).annotate(track)
    assert not isinstance(caught.value, ProviderDown)


@every_api
@pytest.mark.parametrize("body", [b'{"text": "Harb', {"foo": 1}, chat(None)])
def test_a_malformed_answer_is_this_songs_only(server, track, make, good, refusal, header, body):
    server.answers = [(200, body)]
    with pytest.raises(ProviderError) as caught:
        make(server.url, retries=0).annotate(track)
    assert not isinstance(caught.value, ProviderDown) and "\n" not in str(caught.value)


@every_api
def test_a_wrong_key_stops_the_provider_and_is_not_repeated(server, track, make, good, refusal, header, caplog, capfd):
    server.answers = [WRONG_KEY[refusal]]
    with caplog.at_level(logging.DEBUG), pytest.raises(ProviderDown) as caught:
        make(server.url).annotate(track)
    chain, error = [], caught.value
    while error is not None and not error.__suppress_context__:
        chain, error = [*chain, error], error.__cause__ or error.__context__
    assert "status 401" in str(caught.value) and "_API_KEY" in str(caught.value)
    for text in (str(caught.value), repr(chain), caplog.text, *capfd.readouterr()):
        assert SECRET not in text
    assert SECRET not in repr(make(server.url)) + json.dumps(vars(make(server.url).service))


@every_api
def test_a_service_that_is_away_stops_the_provider(server, track, make, good, refusal, header):
    with pytest.raises(ProviderDown, match="cannot be reached"):
        make("http://127.0.0.1:9", retries=0).annotate(track)


def test_without_a_key_nothing_is_sent(monkeypatch, tmp_path, track):
    monkeypatch.chdir(tmp_path)
    for name in ("OPENAI_API_KEY", "GEMINI_API_KEY", "ELEVENLABS_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    for make in (remote.OpenAI, remote.Gemini, remote.ElevenLabs):
        service = make("model")
        with pytest.raises(ProviderDown, match=f"{service.key} is not set"):
            service.secret()


def test_keys_come_from_the_environment_or_a_file(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SOME_KEY", raising=False)
    assert remote.api_key("SOME_KEY") is None
    Path(".env").write_text("# SOME_KEY=no\n\nexport SOME_KEY='a=b'\nOTHER = \"c\"\nnonsense\n", encoding="utf-8")
    assert remote.api_key("SOME_KEY") == "a=b" and remote.api_key("OTHER") == "c"
    monkeypatch.setenv("SOME_KEY", "first")
    assert remote.api_key("SOME_KEY") == "first"
    assert ".env" in (cli.ROOT / ".gitignore").read_text(encoding="utf-8").split()


def test_songs_are_sent_small_and_long_ones_are_refused(track):
    seconds = soundfile.info(track.path).duration
    sizes = [
        len(remote.compressed(track.path, limit)) for limit in (10**7, int(2 * 64e3 / 8) + 1, int(2 * 48e3 / 8) + 1)
    ]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] < 1.2 * 96e3 / 8 * (seconds + 0.2)
    with pytest.raises(ProviderError, match="too long for this service"):
        remote.compressed(track.path, 5000)


# ---------------------------------------------------------------- LRC


def test_lrc_gives_times_and_language(tmp_path):
    track = Track(id="a", path=tmp_path / "歌.mp3")
    assert Lrc().annotate(track).values == {}
    (tmp_path / "歌.lrc").write_bytes("[00:01.00]君のうた\n[00:02.50]もう一度".encode("cp932"))
    answer = Lrc().annotate(track)
    assert answer.values == {"language": "ja"} and "cp932" in answer.problems[0]
    assert answer.lines == (Line(1.0, 2.5, "君のうた"), Line(2.5, None, "もう一度"))


@pytest.mark.parametrize("name", ["ja", "JA-jp", "japanese", "jpn", " Japanese "])
def test_languages_by_code_and_name(name):
    assert transcribers.language_code(name) == "ja"


def test_language_codes_are_those_inference_knows():
    assert set(transcribers._ISO_639_3.values()) <= LANGUAGES
    assert transcribers.language_code("tlh") is None and transcribers.language_code(None, "君のうた") == "ja"


# ---------------------------------------------------------------- models on this machine


@pytest.fixture(scope="module")
def whisper_folder(tmp_path_factory) -> str:
    return services.tiny_whisper(tmp_path_factory.mktemp("whisper"))


def test_whisper_here_on_short_and_long_songs(whisper_folder, tmp_path, track):
    provider = WhisperLocal(whisper_folder, CPU)
    assert provider.annotate(track).values.keys() <= {"lyrics", "language"}
    path = tmp_path / "long.wav"
    soundfile.write(path, 0.1 * np.random.default_rng(1).standard_normal(16000 * 80), 16000)
    answer = provider.annotate(Track(id="long.wav", path=path))
    assert answer == provider.annotate(Track(id="long.wav", path=path))
    assert answer.values["language"] in ("en", "ja")
    assert answer.lines[-1].start > 60  # the third window was heard
    times = [time for line in answer.lines for time in (line.start, line.end)]
    assert times == sorted(times) and times[-1] <= 80.0
    assert answer.values["lyrics"] == "\n".join(line.text for line in answer.lines).strip()
    assert WhisperLocal(whisper_folder, CPU, "ja").annotate(track).values.get("language", "ja") == "ja"


def test_a_model_that_is_not_there_stops_the_provider(tmp_path, track, whisper_folder):
    for provider in (
        WhisperLocal(str(tmp_path), CPU),
        AceStepTranscriber(False, Omni(str(tmp_path), CPU), "<audio>"),
    ):
        with pytest.raises(ProviderDown, match="cannot be loaded"):
            provider.annotate(track)


def test_omni_hears_the_song_where_the_prompt_says(tmp_path, track, monkeypatch):
    folder = services.tiny_omni(tmp_path)
    seen = {}
    generate = Qwen2_5OmniThinkerForConditionalGeneration.generate

    def spy(self, **inputs):
        seen.update(inputs)
        return generate(self, **inputs)

    monkeypatch.setattr(Qwen2_5OmniThinkerForConditionalGeneration, "generate", spy)
    omni = Omni(folder, CPU, max_new_tokens=8)
    text = omni.say("*Task* Transcribe\n<audio>", track.path)
    assert isinstance(text, str) and text == omni.say("*Task* Transcribe\n<audio>", track.path)
    tokenizer = omni._parts[2]
    written = tokenizer.decode(seen["input_ids"][0])
    assert "<|im_start|>user\n*Task* Transcribe\n<|audio_bos|><|AUDIO|>" in written
    # 1 s is 100 frames of mel; the encoder gives one vector per four.
    assert written.count("<|AUDIO|>") == 25 and seen["feature_attention_mask"].sum() == 100
    with pytest.raises(ProviderError, match="instead of languages and lyrics"):
        AceStepTranscriber(False, omni, "*Task* Transcribe\n<audio>").annotate(track)


def test_the_song_changes_what_omni_hears(tmp_path, track):
    omni = Omni(services.tiny_omni(tmp_path / "m"), CPU, max_new_tokens=8)
    other = tmp_path / "other.wav"
    soundfile.write(other, 0.5 * np.sin(np.arange(16000) * 0.3), 16000)
    thinker, _, _ = omni._parts
    with torch.inference_mode():
        for parameter in thinker.parameters():
            parameter.mul_(4.0)  # random weights are too small for a difference to reach the words
    assert omni.say("x", track.path) != omni.say("x", other)


# ---------------------------------------------------------------- configuration


@pytest.mark.parametrize("file", sorted((cli.CONF / "transcriber").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_transcriber_is_a_provider_under_its_own_name(configure, file):
    from hydra.utils import instantiate

    cfg = configure("annotate", f"transcriber={file.stem}", "tempo_key=none")
    if file.stem == "none":
        return
    provider = instantiate(cfg.transcriber)
    assert isinstance(provider, Provider) and provider.name == file.stem
    assert provider.kind == "transcriber" and provider.version
    assert provider.paid == (file.stem in ("whisper_api", "elevenlabs", "gemini"))
    assert "KEY" not in OmegaConf.to_yaml(cfg.transcriber).replace("_API_KEY", "")
