"""Who says what about a song: estimators, transcribers and captioners speak one small protocol."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, runtime_checkable

from safetensors import SafetensorError

from acestep_lora.data.track import Track
from acestep_lora.errors import UserError


class ProviderError(UserError):
    """This song cannot be annotated by this provider; the others can."""


class ProviderDown(ProviderError):
    """No song can: a wrong key, an endpoint that is away, a model that is not there. It is not asked again."""


class Line(NamedTuple):
    """A line of lyrics with its time in seconds; `end` is None where only the start is known."""

    start: float
    end: float | None
    text: str


@contextmanager
def loading(model: str) -> Iterator[None]:
    """Around the reading of a local model: one sentence for a folder or hub id that cannot be used."""
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        raise ProviderDown(f"model {model!r} cannot be loaded ({str(error).splitlines()[0]}).") from error


@dataclass(frozen=True)
class Answer:
    """What a provider says of one song.

    Attributes:
        values: field -> value, fields as in `sidecars.NORMALISE`; a field it knows nothing of is left out.
        confidence: field -> [0, 1], for the fields that have one.
        lines: the lyrics with their times, where the provider knows them.
        problems: remarks for the table, such as "caption shortened".
    """

    values: Mapping[str, object]
    confidence: Mapping[str, float] = field(default_factory=dict)
    lines: tuple[Line, ...] = ()
    problems: tuple[str, ...] = ()


@runtime_checkable
class Provider(Protocol):
    """Annotates songs one by one.

    Attributes:
        kind: "estimator", "transcriber" or "captioner": the rank of its claims (`sidecars.MACHINE`).
        name: as in its YAML file; version: of its model or library, recorded as provenance.
        fields: what it can fill; "lines" are the times of the lyrics, "structure" the tags in them.
        paid: whether each call may cost money; such calls are counted, and only listed with dry_run=true.
    """

    kind: str
    name: str
    version: str
    fields: tuple[str, ...]
    paid: bool

    def annotate(self, track: Track) -> Answer:
        """Raises ProviderError for this song, ProviderDown when no song can be annotated."""
        ...
