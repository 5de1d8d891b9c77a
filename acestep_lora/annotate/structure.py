"""Section tags for lyrics that have none, by a language model that is only asked for line numbers and names."""

from dataclasses import dataclass

from pydantic import BaseModel

from acestep_lora.annotate import lyrics
from acestep_lora.annotate.provider import Answer, ProviderError
from acestep_lora.annotate.remote import Gemini, OpenAI
from acestep_lora.data.track import Track


class Section(BaseModel):
    line: int
    name: str


class Sections(BaseModel):
    sections: list[Section]


@dataclass
class Structure:
    """The model never writes the lyrics, and `annotator.add_structure` compares them once more before it saves."""

    name: str
    service: OpenAI | Gemini
    prompt: str
    paid: bool
    kind, fields = "structure", ("structure",)

    @property
    def version(self) -> str:
        return self.service.model

    def annotate(self, track: Track) -> Answer:
        answer = self.service.ask(f"{self.prompt}\n\n{lyrics.numbered(track.lyrics)}", Sections)
        try:
            tagged = lyrics.with_sections(track.lyrics, {section.line: section.name for section in answer.sections})
        except ValueError as error:
            raise ProviderError(f"{self.service.model} gave sections that cannot be used: {error}.") from error
        return Answer({"lyrics": tagged})
