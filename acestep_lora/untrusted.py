"""Files that somebody else made: read within limits, no code in them run, every complaint about them one sentence."""

import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from acestep_lora.data.fields import line, show
from acestep_lora.data.sidecars import parse_json, read_text
from acestep_lora.errors import UserError

JSON_BYTES = 64 << 20


@contextmanager
def told(complaint: str, kind: type[UserError] = UserError) -> Iterator[None]:
    """Whatever libraries say inside the block of a file's content is raised as `kind`: `complaint`: reason."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - they raise anything, tokenizers a bare Exception
        reason = line(str(error))[:300].rstrip(".") or type(error).__name__
        raise kind(f"{complaint}: {'it lacks ' if isinstance(error, KeyError) else ''}{reason}.") from None


def read_object(path: Path) -> dict:
    """A JSON object. Raises ValueError or OSError for anything else, and for more than JSON_BYTES."""
    found = parse_json(read_text(path, JSON_BYTES)[0])
    if not isinstance(found, dict):
        raise ValueError(f"it holds {show(found)}, an object is expected")
    return found


def read_pt(path: Path) -> object:
    """What torch.save wrote, of tensors and plain values alone; a pickle that wants more is not executed.

    Raises ValueError for a file that would take more memory than disk, and whatever torch raises.
    """
    import torch

    with zipfile.ZipFile(path) as parts:  # files of before torch 1.6 claim any size and are no archives
        if sum(part.file_size for part in parts.infolist()) > path.stat().st_size:
            raise ValueError("it unpacks to more than its size")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # whose text tells how to run the code all the same
        raise ValueError("it holds something else than tensors and plain values, which is never loaded") from None


def is_plain(value: object) -> bool:
    """Whether a value from read_pt is an ordinary tensor that holds as many numbers as it claims to."""
    import torch

    if type(value) is not torch.Tensor or value.layout is not torch.strided or value.device.type != "cpu":
        return False
    size = value.numel() * value.element_size()
    return not value.is_quantized and size <= value.untyped_storage().nbytes()
