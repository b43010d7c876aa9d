"""The pages: the pair that is to be judged, the statistics, and the annotator's name."""

from __future__ import annotations

import secrets
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hmac import compare_digest
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, unquote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from ppo_rlhf.label.guard import LARGEST_BODY, Guard
from ppo_rlhf.label.text import html_of, language_of, turns_of
from ppo_rlhf.preferences import Deal, NotDealt, Store, statistics_of

HERE = Path(__file__).parent
NAME, CSRF = "label_annotator", "label_csrf"  # cookies
YEAR = 365 * 24 * 3600
LONGEST_NAME, LONGEST_NOTE, LONGEST_LOOK = 60, 5_000, 24 * 3600.0  # characters, characters, seconds
MARGINS = {"slightly": 1 / 3, "clearly": 2 / 3, "much": 1.0}  # Llama 2's small margins (Touvron et al., 2023)
RESULT_NAMES = {
    "left": "Left",
    "right": "Right",
    "tie": "Tie",
    "both bad": "Both bad",
    "skip": "Skipped",
    "ranking": "Ranking",
}


@dataclass(frozen=True)
class LabelSettings:
    """What the app shows, and to whom."""

    collection: str
    annotator: str | None = None  # None: each gives his own name
    token: str | None = None
    hosts: frozenset[str] | None = None  # the names by which the server may be called; None: any
    strength: bool = False  # ask how much better
    rank: bool = False  # ask for a ranking also where there are two responses
    blind: bool = False  # keep the sources out of the statistics


@dataclass(frozen=True)
class Button:
    """A way to judge a pair of responses."""

    value: str
    label: str
    keys: str  # names of keys as browsers tell them, separated by blanks
    hint: str
    kind: str


PLAIN = (
    Button("left", "A is better", "1 ArrowLeft a", "1", "main"),
    Button("tie", "Tie", "2 t", "2", "main"),
    Button("right", "B is better", "3 ArrowRight b", "3", "main"),
)
GRADED = (
    Button("left much", "A much better", "1", "1", "main"),
    Button("left clearly", "A better", "2 ArrowLeft a", "2", "main"),
    Button("left slightly", "A slightly better", "3", "3", "main"),
    Button("tie", "Tie", "4 t", "4", "main"),
    Button("right slightly", "B slightly better", "5", "5", "main"),
    Button("right clearly", "B better", "6 ArrowRight b", "6", "main"),
    Button("right much", "B much better", "7", "7", "main"),
)
ASIDE = (
    Button("both bad", "Both bad", "x", "x", "aside"),
    Button("skip", "Skip", "s", "s", "aside"),
)
ASIDE_OF_A_RANKING = (Button("both bad", "All bad", "x", "x", "aside"), ASIDE[1])


def is_name(name: str) -> bool:
    """Whether an annotator may be called so."""
    return 1 <= len(name) <= LONGEST_NAME and name.isprintable() and name == name.strip()


def make_app(store: Store, settings: LabelSettings, *, finish: Callable[[], None] | None = None) -> Starlette:
    """The app over an open store. finish: what the button does that is shown when everything has been judged."""
    pages = Pages(store, settings, finish)
    return Starlette(
        routes=[
            Route("/", pages.label),
            Route("/choose", pages.choose, methods=["POST"]),
            Route("/undo", pages.undo, methods=["POST"]),
            Route("/statistics", pages.statistics),
            Route("/name", pages.name),
            Route("/name", pages.set_name, methods=["POST"]),
            Route("/finish", pages.finish, methods=["POST"]),
            Mount("/static", StaticFiles(directory=HERE / "static")),
        ],
        middleware=[Middleware(Guard, token=settings.token, hosts=settings.hosts)],
        exception_handlers={HTTPException: pages.problem, Exception: pages.failure},
    )


class Pages:
    """The pages of one collection."""

    def __init__(self, store: Store, settings: LabelSettings, finish: Callable[[], None] | None) -> None:
        self.store = store
        self.settings = settings
        self._finish = finish
        self._templates = Environment(
            loader=FileSystemLoader(HERE / "templates"),
            autoescape=True,
            undefined=StrictUndefined,
            auto_reload=False,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._templates.filters.update(percent=_percent, number=_number)

    # ----------------------------------------------------------------------------------------------------------- pages

    async def label(self, request: Request) -> Response:
        """The pair before the annotator, or that nothing is left."""
        annotator = self._annotator(request)
        if annotator is None:
            return RedirectResponse("/name", 303)
        return await run_in_threadpool(self._label_page, request, annotator)

    async def choose(self, request: Request) -> Response:
        """Keeps a choice, then shows the next pair."""
        fields, annotator = await self._sent(request)

        def choose() -> str:
            self.store.choose(annotator=annotator, **_choice_in(fields))
            return "Saved."

        try:
            return await run_in_threadpool(self._then_next, choose, request, annotator)
        except NotDealt as error:
            raise HTTPException(409, "This pair is not before you; reload the page.") from error
        except ValueError as error:
            raise HTTPException(400, "That is no choice for this pair.") from error

    async def undo(self, request: Request) -> Response:
        """Takes the last choice back, then shows its pair."""
        _, annotator = await self._sent(request)

        def undo() -> str:
            return "Undone." if self.store.undo(self.settings.collection, annotator) else "There is nothing to undo."

        return await run_in_threadpool(self._then_next, undo, request, annotator)

    async def statistics(self, request: Request) -> Response:
        """What the choices say so far."""
        choices = await run_in_threadpool(self.store.choices, self.settings.collection)
        found = await run_in_threadpool(statistics_of, choices)
        return self._page(request, "statistics.html", found=found, result_names=RESULT_NAMES)

    async def name(self, request: Request) -> Response:
        """Asks for the annotator's name."""
        return self._page(request, "name.html", longest=LONGEST_NAME)

    async def set_name(self, request: Request) -> Response:
        """Remembers the name in a cookie."""
        name = (await self._fields(request)).get("name", "").strip()
        if not is_name(name) or self.settings.annotator:
            raise HTTPException(400, f"A name has 1 to {LONGEST_NAME} characters, none of them invisible.")
        response = RedirectResponse("/", 303)
        self._set_cookie(request, response, NAME, quote(name))
        return response

    async def finish(self, request: Request) -> Response:
        """Ends the session: the command goes on with its outcome."""
        await self._sent(request)
        if self._finish is None:
            raise HTTPException(404, "There is no such page.")
        self._finish()
        return self._page(request, "message.html", title="Finished", message="You may close this page.", problem=False)

    async def problem(self, request: Request, error: Exception) -> Response:
        """The page of a refusal."""
        assert isinstance(error, HTTPException)
        detail = "There is no such page." if error.status_code == 404 else error.detail
        return self._page(
            request, "message.html", error.status_code, title="That did not work", message=detail, problem=True
        )

    async def failure(self, request: Request, _: Exception) -> Response:
        """The page of a failure of ours, such as a database that does not answer; the server's log has the rest."""
        message = "The server failed, and nothing was saved. Try again."
        return self._page(request, "message.html", 500, title="That did not work", message=message, problem=True)

    # ------------------------------------------------------------------------------------------------------- requests

    def _annotator(self, request: Request) -> str | None:
        given = unquote(request.cookies.get(NAME, ""))
        return self.settings.annotator or given[:LONGEST_NAME] or None

    async def _fields(self, request: Request) -> Mapping[str, str]:
        """The form that one of our own pages sent. Raises HTTPException for another, or one that is too large."""
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > LARGEST_BODY:
                raise HTTPException(413, "That is too long.")
        try:
            fields = dict(parse_qsl(body.decode(), keep_blank_values=True, max_num_fields=50))
        except ValueError as error:
            raise HTTPException(400, "That is no form.") from error
        expected = request.cookies.get(CSRF, "")
        if not expected or not compare_digest(fields.get("csrf", "").encode(), expected.encode()):
            raise HTTPException(403, "This page is too old, or not ours; reload it.")
        return fields

    async def _sent(self, request: Request) -> tuple[Mapping[str, str], str]:
        """A form and who sent it."""
        fields, annotator = await self._fields(request), self._annotator(request)
        if annotator is None:
            raise HTTPException(403, "Say who you are first.")
        return fields, annotator

    # ------------------------------------------------------------------------------------------------------ rendering

    def _then_next(self, change: Callable[[], str], request: Request, annotator: str) -> Response:
        """Makes a change, then shows the labelling page with what it says.

        A plain form gets there by a redirect, so that a reload is safe; our script gets the page at once.
        """
        message = change()
        if "x-live" not in request.headers:
            return RedirectResponse("/", 303)
        return self._label_page(request, annotator, message)

    def _label_page(self, request: Request, annotator: str, message: str = "") -> Response:
        deal = self.store.deal(self.settings.collection, annotator)
        progress = self.store.progress(self.settings.collection, annotator)
        shown: dict[str, Any] = {"annotator": annotator, "progress": progress, "message": message}
        if deal is None:
            finishable = self._finish is not None and progress.elsewhere == 0
            return self._page(request, "done.html", finishable=finishable, **shown)
        return self._page(request, "label.html", **self._view_of(deal), **shown)

    def _view_of(self, deal: Deal) -> dict[str, Any]:
        """What the template shows of a deal: never who wrote what."""
        pair = deal.pair
        responses = [pair.responses[position] for position in deal.shown]
        ranked = self.settings.rank or len(responses) > 2
        return {
            "pair": deal.number,
            "note": deal.note,
            "turns": turns_of(pair.prompt, pair.language),
            "responses": [
                (letter, text, html_of(text), pair.language or language_of(text))
                for letter, text in zip(string.ascii_uppercase, responses, strict=False)
            ],
            "ranked": ranked,
            "buttons": () if ranked else GRADED if self.settings.strength else PLAIN,
            "asides": ASIDE_OF_A_RANKING if ranked else ASIDE,
            "longest_note": LONGEST_NOTE,
        }

    def _page(self, request: Request, template: str, status: int = 200, **shown: Any) -> Response:
        csrf = request.cookies.get(CSRF) or secrets.token_urlsafe(24)
        shown = {"annotator": self._annotator(request), **shown}
        html = self._templates.get_template(template).render(
            csrf=csrf, settings=self.settings, path=request.url.path, **shown
        )
        response = HTMLResponse(html, status)
        if CSRF not in request.cookies:
            self._set_cookie(request, response, CSRF, csrf)
        return response

    def _set_cookie(self, request: Request, response: Response, name: str, value: str) -> None:
        secure = request.url.scheme == "https"
        response.set_cookie(name, value, max_age=YEAR, httponly=True, samesite="lax", secure=secure)


def _choice_in(fields: Mapping[str, str]) -> dict[str, Any]:
    """What a form says of a pair: the arguments of `Store.choose`. Raises ValueError for what is no number."""
    result, _, strength = fields.get("result", "").partition(" ")
    if strength not in MARGINS:
        result, strength = fields.get("result", ""), ""
    seconds = float(fields.get("seconds") or "nan")
    return {
        "number": int(fields.get("pair", "")),
        "result": result,
        "places": [int(fields[name]) for name in sorted(fields) if name.startswith("place")],
        "margin": MARGINS.get(strength),
        "note": fields.get("note", "").replace("\0", "").strip()[:LONGEST_NOTE],
        "seconds": seconds if 0 <= seconds <= LONGEST_LOOK else None,
    }


def _percent(share: float) -> str:
    return f"{100 * share:.0f}\u00a0%"


def _number(number: float | None, form: str = ".2f") -> str:
    """A number with a real minus sign, or a dash for one that there is not."""
    return "—" if number is None else format(number, form).replace("-", "−")
