"""The page: what is where, and which button asks `Review` for what. Everything a song says is shown as text.

Songs and pictures have addresses of their own, by song and never by path, and Gradio's routes for files are closed:
nothing else of this machine can be read through the page.
"""

import re
import shlex
from collections.abc import Callable
from functools import partial
from html import escape
from urllib.parse import quote

import gradio as gr
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import FileResponse, PlainTextResponse, Response
from starlette.middleware.trustedhost import TrustedHostMiddleware

from acestep_lora.annotate.record import Conflict
from acestep_lora.annotate.report import clock, remarks
from acestep_lora.data import fields
from acestep_lora.data.audio import AudioError
from acestep_lora.data.track import TAG_POSITIONS
from acestep_lora.errors import UserError
from acestep_lora.studio.review import HEAD, Form, Review, Settings, picture

LOOPBACK = ("127.0.0.1", "localhost")
KEYS = [f"{note} {mode}" for mode in ("major", "minor") for note in "C C# Db D Eb E F F# Gb G Ab A Bb B".split()]
_CLOSED = re.compile(r"/(gradio_api/)?(file|upload|proxy|stream)\b")
CSS = """
#look { position: relative; cursor: pointer; margin: .5rem 0 } #look img { width: 100%; height: 150px; display: block }
#look i { position: absolute; inset: 0 auto 0 0; width: 2px; background: var(--color-accent) }
#player audio { width: 100% } #message, #player ul { overflow-wrap: anywhere } .bad { color: #c62828 }
"""
# Taps more than two seconds apart begin anew; the median of their distances is the beat.
TAP = """bpm => {
  const now = performance.now(), taps = window.taps = (window.taps || []).filter(() => now - window.taps.at(-1) < 2000)
  taps.push(now)
  const gaps = taps.slice(1).map((t, i) => t - taps[i]).sort((a, b) => a - b)
  return gaps.length < 2 ? bpm : String(Math.round(60000 / gaps[gaps.length >> 1]))
}"""
SCALE = "bpm => Number(bpm) ? String(Math.round({factor} * bpm)) : bpm"
SEEK = (
    "const a = document.querySelector('#player audio'); a.currentTime = a.duration * event.offsetX / this.clientWidth"
)
FOLLOW = "document.querySelector('#look i').style.left = 100 * this.currentTime / this.duration + '%'"


def said(text: str, bad: bool = False) -> str:
    return f'<p class="{"bad" if bad else ""}">{escape(text)}</p>'


def player(review: Review, song: str) -> str:
    """A song as HTML: its picture, with a play head that a click moves, the player and the remarks."""
    url = quote(song)
    told = "".join(f"<li>{escape(remark)}</li>" for remark in remarks(review.track(song)))
    return (
        f'<h2>{escape(song)}</h2><div id="look" onclick="{SEEK}"><img src="picture/{url}" alt=""><i></i></div>'
        f'<audio controls preload="metadata" src="song/{url}" ontimeupdate="{FOLLOW}"></audio>'
        f'<ul class="bad">{told}</ul>'
    )


class Page:
    """Components and their events; a handler returns what changes, by component."""

    def __init__(self, review: Review, settings: Settings) -> None:
        self.review = review
        self.left: set[str] = set()  # songs that were gone on from; what is typed in them is in their drafts
        with gr.Blocks(title="acestep-lora studio", analytics_enabled=False, fill_width=True) as self.blocks:
            with gr.Row():
                with gr.Column(scale=2, min_width=380):
                    self.summary = gr.HTML()
                    shape = {"column_widths": ["40%", "22%", "38%"], "wrap": True, "max_height": 900}
                    self.table = gr.Dataframe(headers=list(HEAD), interactive=False, show_label=False, **shape)
                with gr.Column(scale=5, min_width=600):
                    self._song()
                    self._dataset(settings)
            self._events()

    def _song(self) -> None:
        self.player = gr.HTML(elem_id="player")
        self._fields()
        with gr.Row():
            self.save = gr.Button("Save", variant="primary")
            self.accept = gr.Button("Save as reviewed", variant="primary")
            self.discard = gr.Button("Discard edits")
        self.message = gr.HTML(elem_id="message")
        with gr.Accordion("What the model will see"):
            self.preview = gr.Textbox(show_label=False, interactive=False, lines=8, max_lines=30, elem_id="preview")

    def _dataset(self, settings: Settings) -> None:
        with gr.Accordion("The whole dataset", open=False):
            with gr.Row():
                tag = gr.Textbox(settings.custom_tag, label="Trigger tag")
                place = gr.Dropdown(list(TAG_POSITIONS), value=settings.tag_position, label="Its place")
                ratio = gr.Slider(0, 100, settings.genre_ratio, step=1, label="Draws that use the genre, %")
            self.settings = Settings(tag, place, ratio)
            self.command = gr.Textbox(label="To train with these", interactive=False)
            self.write = gr.Button(f"Write {self.review.output.name}")

    def _fields(self) -> None:
        song, version = gr.Textbox(visible=False), gr.Textbox(visible=False)
        with gr.Row():
            with gr.Column(scale=2):
                caption = gr.Textbox(label="Caption", lines=3)
                genre = gr.Textbox(label="Genre")
                lyrics = gr.Textbox(label="Lyrics", lines=16, max_lines=30)
                tag = gr.Textbox(label="Trigger tag of this song alone")
            with gr.Column(scale=1):
                self.bpm = gr.Textbox(label="BPM")
                with gr.Row():
                    self.tap = gr.Button("Tap", min_width=60, elem_id="tap")
                    self.half = gr.Button("÷ 2", min_width=60)
                    self.double = gr.Button("× 2", min_width=60)
                key = gr.Dropdown(["", *KEYS], label="Key", allow_custom_value=True)
                signatures = ["", "2/4", "3/4", "4/4", "6/8"]
                signature = gr.Dropdown(signatures, label="Time signature", allow_custom_value=True)
                language = gr.Dropdown(sorted(fields.LANGUAGES), label="Language", allow_custom_value=True)
                instrumental = gr.Checkbox(label="Instrumental")
                choices = [("by the genre ratio", ""), ("always the caption", "caption"), ("always the genre", "genre")]
                prompt = gr.Dropdown(choices, label="Prompt")
                self.provider = gr.Dropdown(list(self.review.providers), label="Provider")
                self.ask = gr.Button("Ask this provider")
        metas = (self.bpm, key, signature, language, instrumental, prompt)
        self.form = Form(song, version, caption, genre, lyrics, *metas, tag)

    def _events(self) -> None:
        review, form, private = self.review, list(self.form), {"api_visibility": "private"}
        shown = [self.summary, self.table, self.player, *form, self.message]
        self.blocks.load(self._first, outputs=shown, **private)
        self.table.select(self._select, form, shown, **private)
        for button, run in (
            (self.save, lambda form: (review.save(form), "Saved.")),
            (self.accept, lambda form: (review.save(form, reviewed=True), "Saved and marked as reviewed.")),
            (self.discard, lambda form: (review.discard(form), "This is what the files say.")),
        ):
            button.click(partial(self._attempt, run), form, shown, **private)
        self.ask.click(self._ask, [self.provider, *form], shown, **private)
        scripts = (self.tap, TAP), (self.half, SCALE.format(factor=0.5)), (self.double, SCALE.format(factor=2))
        for button, script in scripts:
            button.click(None, self.bpm, self.bpm, js=script, **private)
        everything = [*form, *self.settings]
        changes = [component.change for component in everything[2:]]
        quietly = {"show_progress": "hidden", "trigger_mode": "always_last"}
        gr.on(changes, self._typed, everything, [self.preview, self.command], **quietly, **private)
        self.write.click(self._write, list(self.settings), self.message, **private)

    def _show(self, form: Form, message: str = "", bad: bool = False) -> dict:
        review, rows = self.review, self.review.rows()
        remarked = sum(bool(row[2]) for row in rows)
        reviewed = sum(map(review.is_reviewed, review.scan.tracks))
        duration = clock(sum(track.duration for track in review.scan.tracks))
        summary = said(f"{len(rows)} songs, {duration}; {remarked} with remarks, {reviewed} reviewed")
        summary += "".join(said(f"{path.name}: {reason}", bad=True) for path, reason in review.scan.problems)
        return {
            self.summary: summary,
            self.table: rows,
            self.player: player(review, form.song) if form.song in review.tracks else "",
            **dict(zip(self.form, form, strict=True)),
            self.message: said(message, bad),
        }

    def _attempt(self, run: Callable[[Form], tuple[Form, str]], *form) -> dict:
        """The form and message that `run` makes of a form; if it fails the form stays as it is, with the reason."""
        form = Form(*form)
        self.review.keep(form)
        try:
            return self._show(*run(form))
        except Conflict as error:
            told = f"{error} Your edits are on top of that: check and save again."
            return self._show(self.review.merge(form), told, bad=True)
        except (UserError, OSError) as error:
            return self._show(form, str(error), bad=True)

    def _go(self, song: str, *form) -> dict:
        self.left.add(Form(*form).song)
        self.left.discard(song)
        draft = "These edits are not saved yet." if song in self.review.drafts else ""
        return self._attempt(lambda _: (self.review.open(song), draft), *form)

    def _first(self) -> dict:
        self.review.rescan()
        songs = [row[0] for row in self.review.rows()]
        if not songs:
            return self._show(Form(), "There are no songs here.", bad=True)
        return self._go(next((song for song in songs if song in self.review.drafts), songs[0]), *Form())

    def _select(self, event: gr.SelectData, *form) -> dict:
        return self._go(event.row_value[0], *form)

    def _ask(self, name: str, *form) -> dict:
        def ask(form: Form) -> tuple[Form, str]:
            filled, answer = self.review.ask(form, name)
            sure = [f"{field} {value:.0%} sure" for field, value in answer.confidence.items()]
            return filled, "; ".join([f"{name} has answered, nothing is saved yet", *sure, *answer.problems])

        return self._attempt(ask, *form)

    def _typed(self, *inputs) -> tuple[str, str]:
        form, settings = Form(*inputs[: len(self.form)]), Settings(*inputs[len(self.form) :])
        if form.song not in self.left:  # else it was sent before the song was left, and its draft is newer
            self.review.keep(form)
        command = [f"dataset.{name}={value}" for name, value in settings._asdict().items()]
        try:
            return self.review.preview(form, settings), shlex.join(command)
        except UserError as error:
            return f"This cannot be saved: {error}", shlex.join(command)

    def _write(self, *settings) -> str:
        try:
            return said(f"Written: {self.review.write_dataset(Settings(*settings))}")
        except (UserError, OSError) as error:
            return said(str(error), bad=True)


def app(review: Review, settings: Settings, host: str) -> FastAPI:
    """The page, the songs and their pictures as an ASGI application."""
    server = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    if host in LOOPBACK:  # another site's name could be made to point here
        server.add_middleware(TrustedHostMiddleware, allowed_hosts=list(LOOPBACK))

    @server.middleware("http")
    async def closed(request: Request, respond: Callable):
        if _CLOSED.match(request.scope["path"]):
            return PlainTextResponse("closed", status_code=403)
        return await respond(request)

    @server.get("/song/{song:path}")
    def audio(song: str) -> FileResponse:
        if path := review.file(song):
            return FileResponse(path, headers={"X-Content-Type-Options": "nosniff"})
        raise HTTPException(404)

    @server.get("/picture/{song:path}")
    def look(song: str) -> Response:
        if path := review.file(song):
            try:
                return Response(picture(path), media_type="image/png")
            except AudioError as error:
                raise HTTPException(404, str(error)) from error
        raise HTTPException(404)

    theme = gr.themes.Soft(
        font=["system-ui", "sans-serif"], font_mono=["system-ui", "sans-serif"]
    )  # none from the network
    style = {"theme": theme, "css": CSS, "footer_links": [], "ssr_mode": False}
    return gr.mount_gradio_app(server, Page(review, settings).blocks, path="/", show_error=False, **style)
