"""A local HTTP server that answers like the APIs do, and songs and tiny models for those that run here."""

import json
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SECRET = "sk-proj-0123456789abcdefSECRET"


@dataclass
class Server:
    """`answers` are given in turn, the last one again and again: (status, body), (status, body, seconds to wait)."""

    url: str
    answers: list[tuple] = field(default_factory=list)
    requests: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)


@contextmanager
def serve():
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            server.requests.append((self.path, {key.lower(): value for key, value in self.headers.items()}, body))
            status, answer, *wait = server.answers.pop(0) if len(server.answers) > 1 else server.answers[0]
            time.sleep(sum(wait))
            content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            if status == 429:
                self.send_header("Retry-After", "0.05")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    class Quiet(ThreadingHTTPServer):
        def handle_error(self, *_):
            pass  # a client that timed out has hung up

    http = Quiet(("127.0.0.1", 0), Handler)
    server = Server(f"http://127.0.0.1:{http.server_port}")
    threading.Thread(target=http.serve_forever, args=[0.05], daemon=True).start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()


# ---------------------------------------------------------------- answers in the shapes of the public references


def whisper(text: str, step: float = 0.4, **segment) -> dict:
    """POST /v1/audio/transcriptions with verbose_json: words without punctuation, segments with a leading space."""
    words = [word.strip(",.!?") for word in text.split()]
    end = round(step * len(words), 2)
    parts = {"id": 0, "seek": 0, "start": 0.0, "end": end, "text": f" {text}", "tokens": [50364, 50864]}
    parts |= {"temperature": 0.0, "avg_logprob": -0.25, "compression_ratio": 1.1, "no_speech_prob": 0.02} | segment
    times = [
        {"word": word, "start": round(step * i, 2), "end": round(step * (i + 1), 2)} for i, word in enumerate(words)
    ]
    usage = {"type": "duration", "seconds": 8}
    answer = {"task": "transcribe", "language": "english", "duration": 7.95, "text": text, "usage": usage}
    return answer | {"segments": [parts], "words": times}


def scribe(text: str, step: float = 0.4) -> dict:
    """POST /v1/speech-to-text of ElevenLabs: words with punctuation, and the spaces between them."""
    parts = []
    for i, word in enumerate(text.split()):
        start = round(step * i, 2)
        parts += [
            {"text": " ", "start": start, "end": start, "type": "spacing", "logprob": 0.0, "speaker_id": None}
        ] * (i > 0)
        parts.append({"text": word, "start": start, "end": start + step, "type": "word", "logprob": -0.1})
    parts.append({"text": "(applause)", "start": 9.0, "end": 9.5, "type": "audio_event", "logprob": 0.0})
    return {"language_code": "eng", "language_probability": 0.98, "text": text, "words": parts}


def gemini(text: str) -> dict:
    """POST /models/...:generateContent."""
    content = {"parts": [{"text": text}], "role": "model"}
    usage = {"promptTokenCount": 300, "candidatesTokenCount": 40, "totalTokenCount": 340}
    return {
        "candidates": [{"content": content, "finishReason": "STOP", "index": 0}],
        "usageMetadata": usage,
        "modelVersion": "gemini-2.5-flash",
    }


def chat(text: str | None) -> dict:
    """POST /v1/chat/completions."""
    message = {"role": "assistant", "content": text, "refusal": None}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1750000000,
        "model": "gpt-audio",
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 300, "completion_tokens": 40, "total_tokens": 340},
    }


# Each service's own way to refuse a key; they may quote it.
WRONG_KEY = {
    "openai": (401, {"error": {"message": f"Incorrect API key provided: {SECRET}.", "type": "invalid_request_error",
                               "param": None, "code": "invalid_api_key"}}),
    "elevenlabs": (401, {"detail": {"status": "invalid_api_key", "message": f"Invalid API key {SECRET}"}}),
    "gemini": (400, {"error": {"code": 400, "message": "API key not valid. Please pass a valid API key.",
                               "status": "INVALID_ARGUMENT",
                               "details": [{"@type": "type.googleapis.com/google.rpc.ErrorInfo",
                                            "reason": "API_KEY_INVALID", "domain": "googleapis.com"}]}}),
}  # fmt: skip


# ---------------------------------------------------------------- tiny random models of the real classes


def tiny_whisper(folder):
    """A Whisper checkpoint with two languages, a token per byte and every time stamp."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import (
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperProcessor,
        WhisperTokenizer,
    )

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = WhisperTokenizer(vocab={letter: i for i, letter in enumerate(letters)}, merges=[])
    names = "endoftext startoftranscript en ja translate transcribe startofprev nospeech notimestamps".split()
    stamps = [f"<|{0.02 * i:.2f}|>" for i in range(1501)]
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|{name}|>" for name in names] + stamps})
    id = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in names}
    small = {f"{part}_{size}": 16 for part in ("encoder", "decoder") for size in ("ffn_dim",)}
    small |= {f"{part}_{size}": 1 for part in ("encoder", "decoder") for size in ("layers", "attention_heads")}
    ends = {name: id["endoftext"] for name in ("eos_token_id", "bos_token_id", "pad_token_id")}
    config = WhisperConfig(
        vocab_size=len(tokenizer), d_model=16, max_target_positions=64, suppress_tokens=None,
        begin_suppress_tokens=None, decoder_start_token_id=id["startoftranscript"], **ends, **small,
    )  # fmt: skip
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(config)
    words = [i for i, letter in enumerate(letters) if letter.isascii() and letter.isalpha()]
    with torch.no_grad():  # it would mostly hear signs otherwise
        model.model.decoder.embed_tokens.weight[words] *= 5
    known = {
        "is_multilingual": True,
        "lang_to_id": {"<|en|>": id["en"], "<|ja|>": id["ja"]},
        "task_to_id": {"transcribe": id["transcribe"], "translate": id["translate"]},
        "no_timestamps_token_id": id["notimestamps"],
        "prev_sot_token_id": id["startofprev"],
        "max_initial_timestamp_index": 50,
    }
    vars(model.generation_config).update(known)
    model.generation_config._from_model_config = False  # or it would not be read again
    model.save_pretrained(folder)
    WhisperProcessor(WhisperFeatureExtractor(feature_size=80), tokenizer).save_pretrained(folder)
    return str(folder)


def tiny_omni(folder):
    """The thinker of a Qwen2.5-Omni checkpoint, with a token per byte."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        PreTrainedTokenizerFast,
        Qwen2_5OmniThinkerConfig,
        Qwen2_5OmniThinkerForConditionalGeneration,
        WhisperFeatureExtractor,
    )

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_ = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    bytes_.pre_tokenizer, bytes_.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    names = "endoftext im_start im_end audio_bos AUDIO audio_eos IMAGE VIDEO vision_bos vision_eos".split()
    special = [f"<|{name}|>" for name in names]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    id = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in names}
    rope = {"mrope_section": [2, 3, 3], "rope_type": "default", "rope_theta": 1e4}
    config = Qwen2_5OmniThinkerConfig(
        audio_config=dict(d_model=32, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=32, output_dim=32),
        text_config=dict(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, rope_parameters=rope, max_position_embeddings=4096,
        ),
        vision_config=dict(
            depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=32, fullatt_block_indexes=[0]
        ),
        audio_token_index=id["AUDIO"], image_token_index=id["IMAGE"], video_token_index=id["VIDEO"],
        audio_start_token_id=id["audio_bos"], audio_end_token_id=id["audio_eos"], pad_token_id=id["endoftext"],
        vision_start_token_id=id["vision_bos"], vision_end_token_id=id["vision_eos"],
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen2_5OmniThinkerForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=128, chunk_length=300).save_pretrained(folder)
    return str(folder)
