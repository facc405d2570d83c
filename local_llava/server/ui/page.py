"""One browser's page: what its user does, turned into questions to a model, and what comes back, shown.

The conversation that is open is here as long as the page is; the others, and all pictures, are in the browser
(`keeper`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from contextlib import aclosing, suppress

from nicegui import Client

from local_llava.errors import LocalLlavaError
from local_llava.server.backend import Backend, UnknownModelError
from local_llava.server.errors import reported
from local_llava.server.settings import ServerSettings
from local_llava.server.ui import conversation as conversations
from local_llava.server.ui import preferences as settings_of_user
from local_llava.server.ui.answering import answer
from local_llava.server.ui.conversation import Conversation, Picture
from local_llava.server.ui.keeper import Keeper
from local_llava.server.ui.layout import Layout
from local_llava.server.ui.preferences import Preferences
from local_llava.server.ui.turns import Actions
from local_llava.types import Options

_SHOW_S, _KEEP_S = 0.1, 2.0
"""Seconds between two looks at an answer that grows, and between two copies of it that the browser keeps."""


class Page:
    """The page of one browser tab."""

    def __init__(self, client: Client, backend: Backend, settings: ServerSettings, prefix: str) -> None:
        self.id = client.id
        self._client, self._backend, self._settings = client, backend, settings
        self._conversation = Conversation()
        self._preferences = Preferences()
        self._pending: list[Picture] = []
        self._wanted: set[str] = set()
        self._arrived: dict[str, bytes] = {}
        self._answering: asyncio.Task[None] | None = None
        self._started = False
        self._ends_as = ("stopped", "")
        self._keeper = Keeper(self.id, prefix, settings.max_body_bytes, self._take, self._trouble, self.stop)
        self._layout = Layout(self, Actions(self._copy, self.ask_again, self._edit))
        client.on_connect(self._start)
        client.on_delete(self.stop)

    # What the browser sends.

    def arrive(self, picture: str, data: bytes) -> bool:
        """Take the bytes of a picture. False if nobody asked for them."""
        if picture not in self._wanted:
            return False
        self._arrived[picture] = data
        return True

    async def _start(self) -> None:
        if self._started:  # The same page, after its connection was interrupted.
            return
        self._started = True
        self.show_models()
        found = await self._keeper.start()
        self._preferences = settings_of_user.from_record(found.get("preferences"))
        self._layout.show_preferences(self._preferences)
        self.show_models()
        opened = conversations.from_record(found.get("open"))
        if opened is not None:
            self._open(opened)
        self._layout.show_titles(found.get("conversations"), self._conversation.id)

    def _take(self, picture: Picture) -> None:
        if len(self._pending) >= self._settings.max_images:
            self._trouble(f"{picture.name} is left out: a question can have {self._settings.max_images} pictures")
            return
        self._pending.append(picture)
        self._layout.show_pending(self._pending)
        self._layout.say(f"{picture.name} is added")

    def _trouble(self, line: str) -> None:
        self._layout.trouble(line)

    # What the user does.

    def pick(self) -> None:
        """Choose pictures from files."""
        self._keeper.pick()

    def photograph(self) -> None:
        """Take a picture with the camera."""
        self._keeper.photograph()

    def take_away(self, picture: Picture) -> None:
        """Leave out a picture that was not asked about yet."""
        self._pending.remove(picture)
        self._layout.show_pending(self._pending)

    def ask(self, text: str) -> None:
        """Ask a question, with the pictures that are pending."""
        text = text.strip()
        if self._busy or not (text or self._pending):
            return
        self._conversation = self._conversation.asked(text, self._pending)
        self._pending = []
        self._layout.show_pending([])
        self._layout.clear_question()
        self._begin()

    def ask_again(self, index: int) -> None:
        """Have a question answered once more, by its index or that of its answer."""
        if not self._busy:
            self._conversation = self._conversation.asked_again(index)
            self._begin()

    def stop(self) -> None:
        """Stop the answer that is given."""
        if self._answering is not None:
            self._answering.cancel()

    async def new(self) -> None:
        """Begin another conversation."""
        await self._finished()
        self._keeper.close()
        self._open(Conversation())
        await self.show_titles()
        self._keeper.focus_question()

    async def open(self, conversation_id: str) -> None:
        """Go on with a conversation that was kept."""
        await self._finished()
        opened = conversations.from_record(await self._keeper.open(conversation_id))
        if opened is None:
            self._trouble("this conversation is not in this browser any more")
        else:
            self._open(opened)
        await self.show_titles()

    async def drop(self, conversation_id: str) -> None:
        """Forget a conversation, and its pictures."""
        if conversation_id == self._conversation.id:
            await self._finished()
            self._keeper.close()
            self._open(Conversation())
        await self._keeper.drop(conversation_id)
        await self.show_titles()

    def prefer(self, preferences: Preferences) -> None:
        """Set what the user wants from now on."""
        self._preferences = preferences
        self._layout.show_preferences(preferences)
        self._keeper.keep_preferences(preferences.to_record())

    @property
    def preferences(self) -> Preferences:
        """What the user wants."""
        return self._preferences

    @property
    def server_options(self) -> Options:
        """What the server was started with."""
        return Options().updated(self._settings.options)

    def show_models(self) -> None:
        """Look anew for the models that there are."""
        self._layout.show_models(self._backend.models(), self._preferences.model)

    async def show_titles(self) -> None:
        """Show which conversations there are."""
        self._layout.show_titles(await self._keeper.titles(), self._conversation.id)

    def _copy(self, index: int) -> None:
        self._keeper.copy(self._conversation.turns[index].text)
        self._layout.say("Copied")

    def _edit(self, index: int, text: str) -> None:
        if not self._busy and (text or self._conversation.turns[index].pictures):
            self._conversation = self._conversation.asked_again(index, text)
            self._begin()

    def _open(self, conversation: Conversation) -> None:
        self._conversation = conversation
        self._layout.turns.show(conversation)
        self._keeper.to_end()

    # Answers.

    @property
    def _busy(self) -> bool:
        return self._answering is not None and not self._answering.done()

    def _begin(self) -> None:
        self._layout.turns.show(self._conversation)
        self._answering = asyncio.create_task(self._answer())

    async def _finished(self) -> None:
        """Stop the answer that is given, and wait until it is kept as far as it came."""
        if self._answering is not None:
            self._answering.cancel()
            with suppress(asyncio.CancelledError):
                await self._answering

    async def _answer(self) -> None:
        with self._client:
            self._layout.show_answering(True)
            self._keeper.focus_question()
            self._ends_as = ("stopped", "")
            # Not wait_for: until Python 3.12 it may lose the cancellation when the user stops the answer.
            limit = asyncio.get_running_loop().call_later(self._settings.request_timeout_s, self._time_out)
            try:
                await self._follow_answer()
            except asyncio.CancelledError:
                self._progress(self._conversation.turns[-1].text, *self._ends_as)
            except Exception as error:
                self._progress(self._conversation.turns[-1].text, error=reported(error).message)
            finally:
                limit.cancel()
                self._wanted, self._arrived = set(), {}
                self._show_end()

    def _time_out(self) -> None:
        self._ends_as = ("", "the answer took too long")
        self.stop()

    async def _follow_answer(self) -> None:
        self._keep()
        self._layout.turns.update_last(self._conversation.turns[-1], self._waiting())
        self._keeper.to_end()
        pictures, complaint = await self._pictures()
        if complaint:
            self._progress("", error=complaint)
            return
        options = settings_of_user.job_options(self._preferences, self._settings.options, self._settings.max_tokens)
        job = conversations.job(self._conversation, pictures, options)
        self._arrived = {}
        shown = kept = time.monotonic()
        steps = answer(self._backend, self._model, job)
        async with aclosing(steps):
            async for step in steps:
                self._progress(step.text, step.note, step.error)
                if time.monotonic() - shown >= _SHOW_S:
                    self._layout.turns.update_last(self._conversation.turns[-1], "Answering…")
                    shown = time.monotonic()
                if time.monotonic() - kept >= _KEEP_S:
                    self._keep()
                    kept = time.monotonic()

    async def _pictures(self) -> tuple[Mapping[str, bytes], str]:
        """The pictures of the conversation, and what went wrong."""
        wanted = conversations.wanted_pictures(self._conversation)
        if len(wanted) > self._settings.max_images:
            most = self._settings.max_images
            return {}, f"the conversation has {len(wanted)} pictures, and the server takes {most}: begin another one"
        if not wanted:
            return {}, ""
        self._wanted, self._arrived = set(wanted), {}
        try:
            complaint = await self._keeper.send(wanted)
        except TimeoutError:
            complaint = "the browser did not send its pictures"
        if not complaint and self._wanted - self._arrived.keys():
            complaint = "a picture did not arrive"
        return self._arrived, complaint

    @property
    def _model(self) -> str | None:
        """The model that the user chose, if it is still there; None for the default one."""
        with suppress(LocalLlavaError):
            return self._backend.info(self._preferences.model).name
        return None

    def _waiting(self) -> str:
        """What an answer waits for, in words."""
        with suppress(UnknownModelError):
            info = self._backend.info(self._model)
            if not info.loaded:
                return f"Loading {info.name}…"
        return "Reading…"

    def _progress(self, text: str, note: str = "", error: str = "") -> None:
        self._conversation = self._conversation.answered(text, note, error)

    def _keep(self) -> None:
        self._keeper.keep(self._conversation)

    def _show_end(self) -> None:
        """Show the answer as it ended, and keep it, unless the page is gone."""
        if self._client.is_deleted:
            return
        last = self._conversation.turns[-1]
        self._layout.turns.update_last(last)
        self._layout.show_answering(False)
        self._layout.say(last.error or last.text or last.note)
        self._keep()
        self._later = asyncio.create_task(self._titles_later())

    async def _titles_later(self) -> None:
        with self._client, suppress(TimeoutError):
            await self.show_titles()
