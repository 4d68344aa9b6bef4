"""Access control: an ASGI middleware before every page, asset and websocket of the dashboard.

On loopback without a token it accepts requests whose Host is a loopback name: those of a page of another site that resolves its
own name to 127.0.0.1 (DNS rebinding) are not. With a token, every request must carry it: `Authorization: Bearer`, or the cookie
that `?token=` sets once.
"""

from __future__ import annotations

import hashlib
import hmac
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

from sluice.common.errors import ConfigError

MIN_TOKEN = 16
COOKIE = "sluice_token"
LOOPBACK = "127.0.0.1"
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}
Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Callable[[], Awaitable[Any]], Send], Awaitable[None]]


def check_token(host: str, token: str | None) -> None:
    """Refuse a short token, and a public address without one. Raises ConfigError."""
    if token is not None and len(token) < MIN_TOKEN:
        raise ConfigError(f"the dashboard's token has {len(token)} characters: use {MIN_TOKEN} or more")
    if host not in _LOOPBACK and token is None:
        raise ConfigError(
            f"--host {host} lets other machines look: set SLUICE_DASHBOARD_TOKEN or --token-file to a token of {MIN_TOKEN} or "
            "more characters, or stay on 127.0.0.1"
        )


def free_port(host: str, port: int) -> int:
    """Return the port, or any free one for 0. Raises ConfigError when it is in use."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(f"--port {port} on {host}: {error.strerror}; choose another one, or 0") from None
        return int(probe.getsockname()[1])


def page_url(host: str, port: int) -> str:
    """Return the address of the dashboard."""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"


class AuthMiddleware:
    """Wraps the app."""

    def __init__(self, app: App, *, token: str | None) -> None:
        self._app, self._token = app, token
        self._pass = hashlib.sha256(b"sluice dashboard " + token.encode()).hexdigest() if token else ""

    async def __call__(self, scope: Scope, receive: Any, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self._app(scope, receive, send)
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        query = parse_qsl(scope.get("query_string", b"").decode("latin-1"))
        if self._token is None:
            if _host_of(headers) in _LOOPBACK and _is_same_origin(headers):
                return await self._app(scope, receive, send)
            return await _answer(scope, send, 403, "this dashboard answers on 127.0.0.1 and localhost only")
        if not _is_same_origin(headers):
            return await _answer(scope, send, 403, "a page of another site may not read the dashboard")
        bearer = headers.get("authorization", "").removeprefix("Bearer ")
        if _matches(bearer, self._token) or _matches(_cookie(headers), self._pass):
            return await self._app(scope, receive, send)
        if scope["type"] == "http" and _matches(dict(query).get("token", ""), self._token):
            rest = urlencode([(name, value) for name, value in query if name != "token"])
            cookie = f"{COOKIE}={self._pass}; Path=/; HttpOnly; SameSite=Strict"
            cookie += "; Secure" if scope.get("scheme") == "https" else ""
            moved = [("location", scope["path"] + (f"?{rest}" if rest else "")), ("set-cookie", cookie)]
            return await _answer(scope, send, 303, "", moved)
        return await _answer(scope, send, 401, "this dashboard needs its token: open it once as /?token=TOKEN")


def _matches(shown: str, wanted: str) -> bool:
    return hmac.compare_digest(shown.encode(), wanted.encode())


def _host_of(headers: dict[str, str]) -> str:
    return urlsplit("//" + headers.get("host", "")).hostname or ""


def _is_same_origin(headers: dict[str, str]) -> bool:
    origin = headers.get("origin")
    return origin is None or urlsplit(origin).netloc == headers.get("host")


def _cookie(headers: dict[str, str]) -> str:
    try:
        morsel = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        return ""
    return morsel.value if morsel else ""


async def _answer(
    scope: Scope, send: Send, status: int, text: str, headers: list[tuple[str, str]] | None = None
) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    shown = [("content-type", "text/plain; charset=utf-8"), *(headers or [])]
    encoded = [(name.encode(), value.encode()) for name, value in shown]
    await send({"type": "http.response.start", "status": status, "headers": encoded})
    await send({"type": "http.response.body", "body": (text + "\n" if text else "").encode()})
