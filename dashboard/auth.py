"""Access control: an ASGI middleware before every page, asset and websocket of the dashboard.

On loopback without a token it accepts requests whose Host is a loopback name: those of a page of another site that resolves its
own name to 127.0.0.1 (DNS rebinding) are not. With a token, every request must carry it: `Authorization: Bearer`, or the cookie
that `?token=` sets once.
"""

from __future__ import annotations

import hashlib
import hmac
import socket
from urllib.parse import urlencode, urlsplit

from starlette.requests import HTTPConnection
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocketClose

from sluice.common.errors import ConfigError

MIN_TOKEN = 16
COOKIE = "sluice_token"
LOOPBACK = "127.0.0.1"
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}


def check_token(host: str, token: str | None) -> None:
    """Refuse a short token, and a public address without one. Raises ConfigError."""
    if token is not None and len(token) < MIN_TOKEN:
        raise ConfigError(f"the dashboard's token has {len(token)} characters: use {MIN_TOKEN} or more")
    if host not in _LOOPBACK and token is None:
        raise ConfigError(
            f"--host {host} lets other machines look: set SLUICE_DASHBOARD_TOKEN or --token-file to a token of {MIN_TOKEN} or "
            "more characters, or stay on 127.0.0.1"
        )


def listen(host: str, port: int) -> tuple[int, int]:
    """Listen on the port, or on any free one for 0; return the socket's file descriptor and the port.

    Nobody else gets the port from then on, and the kernel keeps who asks for the page until it is served. Raises ConfigError
    where the port is in use.
    """
    made = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host, port))
    except OSError as error:
        made.close()
        raise ConfigError(f"--port {port} on {host}: {error.strerror}; choose another one, or 0") from None
    made.listen()
    port = made.getsockname()[1]
    return made.detach(), port


def page_url(host: str, port: int, **query: str) -> str:
    """Return the address of the dashboard."""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/" + (f"?{urlencode(query)}" if query else "")


class AuthMiddleware:
    """Wraps the app."""

    def __init__(self, app: ASGIApp, *, token: str | None) -> None:
        self._app, self._token = app, token
        self._pass = hashlib.sha256(b"sluice dashboard " + token.encode()).hexdigest() if token else ""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(HTTPConnection(scope)) if scope["type"] in ("http", "websocket") else None
        if refusal is None:
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await WebSocketClose(1008)(scope, receive, send)
        else:
            await refusal(scope, receive, send)

    def _refusal(self, request: HTTPConnection) -> Response | None:
        """Return the answer to a request that does not reach the app."""
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        is_same_origin = origin is None or urlsplit(origin).netloc == host
        if self._token is None:
            if urlsplit("//" + host).hostname in _LOOPBACK and is_same_origin:
                return None
            return PlainTextResponse("this dashboard answers on 127.0.0.1 and localhost only\n", 403)
        if not is_same_origin:
            return PlainTextResponse("a page of another site may not read the dashboard\n", 403)
        bearer = request.headers.get("authorization", "").removeprefix("Bearer ")
        if _matches(bearer, self._token) or _matches(request.cookies.get(COOKIE, ""), self._pass):
            return None
        if _matches(request.query_params.get("token", ""), self._token):
            url = request.url.remove_query_params("token")
            moved = RedirectResponse(url.path + (f"?{url.query}" if url.query else ""), 303)
            moved.set_cookie(COOKIE, self._pass, httponly=True, samesite="strict", secure=url.scheme == "https")
            return moved
        return PlainTextResponse("this dashboard needs its token: open it once as /?token=TOKEN\n", 401)


def _matches(shown: str, wanted: str) -> bool:
    return hmac.compare_digest(shown.encode(), wanted.encode())
