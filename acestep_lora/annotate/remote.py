"""Models behind an API: one class per wire protocol, keys that stay secret, and failures told in one sentence.

A key comes from the environment or from a `.env` in the working folder and goes to the service alone. Rate limits and
passing faults are retried with back-off by the SDKs. What cannot be mended for any song (a refused key, an exhausted
quota, a service that is away) is ProviderDown; everything else is this song's ProviderError.
"""

import base64
import io
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import httpx
import soundfile
from pydantic import BaseModel, Field, ValidationError

from acestep_lora.annotate.provider import ProviderDown, ProviderError
from acestep_lora.data import audio, fields

Form = TypeVar("Form", bound=BaseModel)

RATE = 32_000  # Hz, mono: speech models hear less, music models about as much
KBPS = (96, 64, 48)  # of the mp3, constant; the best that fits is sent
INLINE_BYTES = 14_000_000  # of a request of 20 MB, in base64
BEST_KBPS, WORST_KBPS = 320, 32  # libsndfile's compression levels 0 and 1
# No other song will fare better: key, payment, model, quota, and a service that stays away after all retries.
HOPELESS = {401, 402, 403, 404, 429, 502, 503, 504}
INSTALL = 'pip install "acestep-lora[annotate]"'


def api_key(variable: str) -> str | None:
    """A key from the environment, else from `.env` in the working folder; None where there is none."""
    return os.environ.get(variable) or _dotenv().get(variable)


def _dotenv() -> dict[str, str]:
    try:
        rows = Path(".env").read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError):
        return {}
    pairs = (row.strip().removeprefix("export ").partition("=") for row in rows if not row.lstrip().startswith("#"))
    return {name.strip(): value.strip().strip("'\"") for name, equals, value in pairs if equals}


def compressed(path: Path, max_bytes: int) -> bytes:
    """A song as mono mp3 of at most `max_bytes`. Raises AudioError, or ProviderError for a song that is too long."""
    samples = audio.mono(path, RATE)
    seconds = len(samples) / RATE
    for kbps in KBPS:
        if kbps * 1000 / 8 * (seconds + 1) < max_bytes:
            level, file = (BEST_KBPS - kbps) / (BEST_KBPS - WORST_KBPS), io.BytesIO()
            soundfile.write(file, samples, RATE, format="MP3", compression_level=level, bitrate_mode="CONSTANT")
            return file.getvalue()
    raise ProviderError(f"{path.name} is too long for this service, {seconds / 60:.0f} min: split it.")


@dataclass
class Service:
    """What all services share.

    Attributes:
        key: the environment variable that holds the key.
        base_url: of a compatible server, which may do without a key; None is the official one.
        timeout: seconds of one attempt; retries: attempts after the first.
    """

    model: str
    key: str
    base_url: str | None = None
    timeout: float = 300.0
    retries: int = 5

    def secret(self) -> str:
        if secret := api_key(self.key):
            return secret
        if self.base_url:
            return "none"  # the SDKs insist on one
        raise ProviderDown(f"{self.key} is not set: put it into the environment or into a .env in this folder.")

    def refused(self, status: int, message: object) -> ProviderError:
        """The error for an HTTP status, without the key, which some services quote."""
        text = fields.line(str(message))
        text = text.replace(self.secret(), "***")[:300]
        advice = {401: self.key, 403: self.key, 404: f"model={self.model}"}.get(status)
        kind = ProviderDown if status in HOPELESS else ProviderError
        return kind(f"{self.model} answered with status {status} ({text}){f'; check {advice}' if advice else ''}.")

    @contextmanager
    def told(self) -> Iterator[None]:
        """Turns what goes wrong on the way, and answers of another form than asked for, into ProviderErrors."""
        for name in ("httpx", "httpx2", "httpcore", "httpcore2", "openai", "google_genai", "elevenlabs"):
            logging.getLogger(name).setLevel(logging.WARNING)  # they would log every request, headers and all
        try:
            yield
        except ModuleNotFoundError as error:
            raise ProviderDown(f"{self.model} needs {error.name}: {INSTALL}.") from None
        except httpx.TimeoutException:
            raise ProviderError(f"{self.model} did not answer within {self.timeout:g} s.") from None
        except httpx.HTTPError as error:
            raise ProviderDown(f"{self.model} cannot be reached ({type(error).__name__}): check the network.") from None
        except ValidationError as error:
            where = ".".join(map(str, error.errors(include_input=False)[0]["loc"])) or "the whole"
            raise ProviderError(f"{self.model} answered in an unexpected form ({where} cannot be read).") from None


@dataclass
class OpenAI(Service):
    """The OpenAI API, and every server that is compatible with it."""

    key: str = "OPENAI_API_KEY"

    @cached_property
    def client(self):
        import openai

        return openai.OpenAI(
            api_key=self.secret(), base_url=self.base_url, timeout=self.timeout, max_retries=self.retries
        )

    @contextmanager
    def told(self) -> Iterator[None]:
        with super().told():
            import openai

            try:
                yield
            except openai.APIStatusError as error:
                raise self.refused(error.status_code, error.message) from None
            except openai.APITimeoutError:
                raise ProviderError(f"{self.model} did not answer within {self.timeout:g} s.") from None
            except openai.APIConnectionError:
                raise ProviderDown(f"{self.model} cannot be reached: check the network and base_url.") from None

    def transcribe(self, song: Path, form: type[Form], **options: object) -> Form:
        """audio.transcriptions, its JSON in the form of a pydantic model."""
        mp3 = compressed(song, 25_000_000)
        with self.told():
            send = self.client.audio.transcriptions.with_raw_response.create
            return form.model_validate_json(send(model=self.model, file=("song.mp3", mp3), **options).content)

    def say(self, prompt: str, song: Path | None = None) -> str:
        """A chat completion, after listening to a song if there is one; `<audio>` in a prompt says where it goes."""
        content = _content(prompt, song)
        with self.told():
            return self._chat(content)

    def ask(self, prompt: str, form: type[Form], song: Path | None = None) -> Form:
        """The same in the form of a pydantic model, whose fields have no defaults."""
        content, schema = _content(prompt, song), _closed(form.model_json_schema())
        forced = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}
        with self.told():
            import openai

            try:
                return parse(self._chat(content, response_format=forced), form)
            except openai.BadRequestError:  # audio models and some servers know no response_format
                request = {"type": "text", "text": f"Answer in JSON alone, by this schema: {json.dumps(schema)}"}
                return parse(self._chat([*content, request]), form)

    def _chat(self, content: list[dict], **options: object) -> str:
        send = self.client.chat.completions.with_raw_response.create
        raw = send(model=self.model, messages=[{"role": "user", "content": content}], **options).content
        return _Completion.model_validate_json(raw).choices[0].message.content


def _closed(schema: dict) -> dict:
    """A JSON schema whose objects have no other keys, as OpenAI's strict mode wants it."""
    closed = {name: _closed(part) if isinstance(part, dict) else part for name, part in schema.items()}
    return closed | ({"additionalProperties": False} if "properties" in schema else {})


def _content(prompt: str, song: Path | None) -> list[dict]:
    if song is None:
        return [{"type": "text", "text": prompt}]
    data = base64.b64encode(compressed(song, INLINE_BYTES)).decode()
    before, mark, after = prompt.partition("<audio>")
    texts = (before, after) if mark else ("", prompt)
    parts = [{"type": "text", "text": text} if text.strip() else None for text in texts]
    parts.insert(1, {"type": "input_audio", "input_audio": {"data": data, "format": "mp3"}})
    return [part for part in parts if part]


@dataclass
class Gemini(Service):
    """The Gemini API."""

    key: str = "GEMINI_API_KEY"

    @cached_property
    def client(self):
        from google import genai
        from google.genai import types

        options = types.HttpOptions(
            base_url=self.base_url,
            timeout=round(self.timeout * 1000),
            retry_options=types.HttpRetryOptions(attempts=self.retries + 1),
            httpx_client=httpx.Client(timeout=self.timeout),
        )
        return genai.Client(api_key=self.secret(), http_options=options)

    @contextmanager
    def told(self) -> Iterator[None]:
        with super().told():
            from google.genai import errors

            try:
                yield
            except errors.APIError as error:
                status = 401 if "API_KEY_INVALID" in str(error.details) else error.code  # sent with status 400
                raise self.refused(status, error.message) from None
            except (errors.UnknownApiResponseError, json.JSONDecodeError):
                raise ProviderError(f"{self.model} answered in an unexpected form.") from None

    def ask(self, prompt: str, form: type[Form], song: Path | None = None) -> Form:
        """An answer in the form of a pydantic model, after listening to a song if there is one."""
        mp3 = compressed(song, INLINE_BYTES) if song else None
        with self.told():
            from google.genai import types

            parts = [types.Part.from_bytes(data=mp3, mime_type="audio/mp3")] if mp3 else []
            answer = self.client.models.generate_content(
                model=self.model,
                contents=[*parts, prompt],
                config={"response_mime_type": "application/json", "response_json_schema": form.model_json_schema()},
            )
            return parse(answer.text, form)


@dataclass
class ElevenLabs(Service):
    """The speech-to-text of ElevenLabs, Scribe."""

    key: str = "ELEVENLABS_API_KEY"

    @cached_property
    def client(self):
        from elevenlabs.client import ElevenLabs

        patient = httpx.Client(timeout=self.timeout, transport=httpx.HTTPTransport(retries=self.retries))
        return ElevenLabs(api_key=self.secret(), base_url=self.base_url, httpx_client=patient)

    @contextmanager
    def told(self) -> Iterator[None]:
        with super().told():
            from elevenlabs.core import ApiError, ParsingError

            try:
                yield
            except ApiError as error:
                if error.status_code == 200:  # the SDK's way to say that the body is no JSON
                    raise ProviderError(f"{self.model} answered in an unexpected form.") from None
                raise self.refused(error.status_code or 0, error.body) from None
            except ParsingError:
                raise ProviderError(f"{self.model} answered in an unexpected form.") from None

    def transcribe(self, song: Path, form: type[Form], **options: object) -> Form:
        mp3 = compressed(song, 100_000_000)
        with self.told():
            answer = self.client.speech_to_text.convert(
                model_id=self.model,
                file=("song.mp3", mp3),
                request_options={"max_retries": self.retries, "timeout_in_seconds": self.timeout},
                **options,
            )
            return form.model_validate(answer, from_attributes=True)


class _Message(BaseModel):
    content: str


class _Choice(BaseModel):
    message: _Message


class _Completion(BaseModel):
    choices: list[_Choice] = Field(min_length=1)


def parse(text: str | None, form: type[Form]) -> Form:
    """JSON, also within the prose or the code fence that some models put around it. Raises pydantic.ValidationError."""
    text = text or ""
    return form.model_validate_json(text[max(0, text.find("{")) : text.rfind("}") + 1])
