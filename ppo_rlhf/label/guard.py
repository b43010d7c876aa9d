"""What stands before every page: who may ask, from where, how much, and what a browser may do with the answer."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LARGEST_BODY = 64 * 1024  # bytes of a request
ACCESS = "label_access"  # the cookie that stands for the token
PAUSE = 0.5  # seconds after a wrong token
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


class Guard:
    """ASGI middleware. With a token, only those who have it get in; every POST must come from our own pages."""

    def __init__(self, app: ASGIApp, *, token: str | None, hosts: frozenset[str] | None) -> None:
        """hosts: the names by which we may be called, against DNS rebinding; None: any."""
        self.app = app
        self.access = None if token is None else hashlib.sha256(token.encode()).hexdigest()
        self.hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        answer = await self._refusal(scope) or self.app

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
            await send(message)

        await answer(scope, receive, send_with_headers)

    async def _refusal(self, scope: Scope) -> Response | None:
        """The answer to one who may not pass."""
        headers = Headers(scope=scope)
        if self.hosts is not None and _host_of(headers.get("host", "")) not in self.hosts:
            return PlainTextResponse("This server is not known by that name.", 400)
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > LARGEST_BODY:
            return PlainTextResponse("The request is too large.", 413)
        if scope["method"] not in ("GET", "HEAD") and not _is_same_origin(headers):
            return PlainTextResponse("The request came from another site.", 403)
        return await self._entry(scope, headers) if self.access is not None else None

    async def _entry(self, scope: Scope, headers: Headers) -> Response | None:
        """Lets in who has the cookie; gives it to who has the token, and takes the token out of the address bar."""
        assert self.access is not None
        cookies: SimpleCookie = SimpleCookie()
        try:
            cookies.load(headers.get("cookie", ""))
        except CookieError:
            cookies.clear()
        if ACCESS in cookies and hmac.compare_digest(cookies[ACCESS].value, self.access):
            return None
        (given,) = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[:1]
        if given and hmac.compare_digest(hashlib.sha256(given.encode()).hexdigest(), self.access):
            response = RedirectResponse("/" + scope["path"].lstrip("/"), 303)  # "//host" would lead away
            response.set_cookie(
                ACCESS, self.access, httponly=True, samesite="lax", secure=scope["scheme"] == "https", path="/"
            )
            return response
        if given:
            await asyncio.sleep(PAUSE)
        return PlainTextResponse("Open the link that ends in ?token=… once; it was printed where the server runs.", 401)


def _host_of(authority: str) -> str:
    """The host in a Host header, without its port."""
    return urlsplit(f"//{authority}").hostname or ""


def _is_same_origin(headers: Headers) -> bool:
    """Whether a browser says that our own page sent the request. Other programs say nothing: their token must do."""
    if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        return False
    origin = headers.get("origin")
    return origin is None or urlsplit(origin).netloc == headers.get("host")
