"""Whatever bytes a file from elsewhere holds: a value, or one sentence; never a crash, a hang, or gigabytes.

`pytest -m slow tests/test_fuzz.py` tries a hundred times as many.
"""

import copy
import json
import struct
import sys
import time

import attacks
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

QUICK, LONG = 12, 1500
SECONDS = 10  # of one input
GROWTH = 1 << 30  # bytes, of one input; Hypothesis keeps every input, which is no matter of ours

NASTY = [
    None,
    True,
    -1,
    0,
    1,
    3,
    2**31,
    2**63,
    10**30,
    0.5,
    -0.0,
    1e300,
    "",
    "x",
    "9" * 20,
    "\ud800",
    "a\0b",
    "\x1b[31m",
]
NASTY += ["../../x", "/etc/passwd", "C:\\x", [], {}, [[]], [1], ["x"], {"x": 1}, {"_target_": "os.abort"}]
nasty = st.sampled_from(NASTY).map(copy.deepcopy) | st.text(max_size=8) | st.integers() | st.floats()
TOKENS = [b"\0", b"\xff", b"\n", b'"', b"{", b"[", b"]]", b":", b",", b"[00:", b"<99:99.99>", b"9" * 30, b"NaN", b"\r"]
TOKENS += [b"&a [*a,*a]", b"<<: ", b"!!python/name:os", b"\x1b[2J", b"PK\x03\x04", b"\x80\x02", b"1e999", b"\xe3\x80"]
LENGTHS = [0, 1, 10**10, 2**63, 2**64 - 1]


@st.composite
def spoilt_bytes(draw, seed: bytes) -> bytes:
    data = bytearray(seed)
    for _ in range(draw(st.integers(1, 5))):
        at = draw(st.integers(0, max(0, len(data) - 1)) | st.integers(0, min(len(data), 120)))
        match draw(st.integers(0, 4)):
            case 0:
                data[at : at + 1] = bytes([draw(st.integers(0, 255))])
            case 1:
                data[at:at] = draw(st.sampled_from(TOKENS))
            case 2:
                del data[at : at + draw(st.integers(1, 40))]
            case 3:
                del data[at:]
            case 4:
                data[at:at] = data[: draw(st.integers(0, 60))]
    return bytes(data)


def places(document: object) -> list[tuple]:
    """(container, key) of every value in a JSON document."""
    if not isinstance(document, dict | list):
        return []
    keys = list(document) if isinstance(document, dict) else range(len(document))
    return [(document, key) for key in keys] + [place for key in keys for place in places(document[key])]


@st.composite
def spoilt_document(draw, seed: bytes) -> object:
    document = json.loads(seed)
    for _ in range(draw(st.integers(1, 3))):
        found = places(document)
        if not found or draw(st.integers(0, 30)) == 0:
            return draw(nasty)
        container, key = draw(st.sampled_from(found))
        match draw(st.integers(0, 5)):
            case 0:
                del container[key]
            case 1:
                container[key] = [container[key]]
            case 2 if isinstance(container, dict):
                container[str(draw(nasty))] = container.pop(key)
            case _:
                container[key] = draw(nasty)
    return document


def dumped(document: object) -> bytes:
    return json.dumps(document).encode()


@st.composite
def spoilt_tensors(draw, seed: bytes) -> bytes:
    """A safetensors file of another header, length or content."""
    size = struct.unpack("<Q", seed[:8])[0]
    header = seed[8 : 8 + size]
    match draw(st.integers(0, 3)):
        case 0:
            return draw(spoilt_bytes(seed))
        case 1:
            return (
                struct.pack("<Q", draw(st.sampled_from([0, 1, 10**10, 2**63, 2**64 - 1, size - 1, size + 1])))
                + seed[8:]
            )
        case 2:
            header = dumped(draw(spoilt_document(header)))
        case 3:
            header = draw(spoilt_bytes(header))
    return struct.pack("<Q", len(header)) + header + seed[8 + size :]


def inputs(attack: attacks.Attack) -> st.SearchStrategy[bytes]:
    seeds = st.sampled_from(attack.seeds)
    if attack.kind == "json":
        return seeds.flatmap(lambda seed: spoilt_document(seed).map(dumped) | spoilt_bytes(seed))
    return seeds.flatmap(spoilt_tensors if attack.kind == "safetensors" else spoilt_bytes)


def memory() -> int:
    """The most bytes this process ever had, 0 where that is not told."""
    resource = pytest.importorskip("resource") if sys.platform != "win32" else None
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if resource else 0


def drive(name: str, count: int) -> dict[bool, int]:
    """Try `count` inputs -> how many were of use, and how many refused."""
    attack, tried = attacks.attacks()[name], {True: 0, False: 0}
    for seed in attack.seeds:
        attacks.once(seed, attack)

    @settings(
        max_examples=count, deadline=None, database=None, derandomize=count == QUICK, suppress_health_check=HealthCheck
    )
    @given(inputs(attack))
    def attempt(data: bytes) -> None:
        started, before = time.monotonic(), memory()
        tried[attacks.once(data, attack)] += 1
        assert time.monotonic() - started < SECONDS and memory() - before < GROWTH

    attempt()
    return tried


@pytest.mark.parametrize("name", attacks.attacks())
def test_any_bytes_are_of_use_or_refused(name):
    drive(name, QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("name", attacks.attacks())
def test_many_bytes_are_of_use_or_refused(name):
    print(name, drive(name, LONG))
