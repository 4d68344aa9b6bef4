"""The URL of a Redis, read strictly before any library guesses what it means.

An IPv6 address stands in brackets; `/`, `?`, `#` and blanks in a user's name or password are percent-encoded. A message shows no
part of a URL that may be a password: one that is in none of the forms below is not shown at all. A user without a colon may be a
password that lacks it, and is in none.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import parse_qsl, unquote

from sluice.common.errors import ConfigError

_WHO, _QUERY = r"(?:(?P<who>[^/?#\x00-\x20]*:[^/?#\x00-\x20]*)@)?", r"(?:\?(?P<query>[^#@\s]*))?"
_HOST = r"(?:(?:[\w.-]+|\[[\w:.%-]+\])(?::[0-9]{1,5})?)"
_DATABASE = r"(?:/(?P<database>[0-9]{0,9}))?"
_TLS = (
    "ssl_ca_certs",
    "ssl_ca_path",
    "ssl_certfile",
    "ssl_keyfile",
    "ssl_password",
    "ssl_cert_reqs",
    "ssl_check_hostname",
)


class _Form(NamedTuple):
    pattern: str
    example: str
    port: int
    options: tuple[str, ...] = ()
    "of redis-py's and kombu's those that both know, and that change neither what commands return nor how long they wait"


_FORMS = {
    "redis": _Form(rf"{_WHO}(?P<hosts>{_HOST}?){_DATABASE}{_QUERY}", "redis://:password@host:6379/0", 6379),
    "rediss": _Form(
        rf"{_WHO}(?P<hosts>{_HOST}?){_DATABASE}{_QUERY}",
        "rediss://:password@host:6379/0?ssl_ca_certs=ca.crt",
        6379,
        _TLS,
    ),
    "unix": _Form(
        rf"{_WHO}(?P<name>/[^?#@]+){_QUERY}", "unix://:password@/path/of/socket?db=0", 0, ("db", "username", "password")
    ),
    "sentinel": _Form(
        rf"{_WHO}(?P<hosts>{_HOST}(?:,{_HOST})*,?)/(?P<name>[^/?#@\s]+){_DATABASE}/?{_QUERY}",
        "sentinel://:password@host1:26379,host2:26379/mymaster/0",
        26379,
        ("sentinel_password",),
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Address:
    """A parsed URL."""

    scheme: str
    hosts: tuple[tuple[str, int], ...]
    "none: a socket, or this machine"
    name: str
    "path of the socket, or the master's name"
    database: int
    username: str | None
    password: str | None
    options: dict[str, str]
    shown: str
    "the URL as it may be logged"


def parse_address(url: str) -> Address:
    """Parse a URL. Raises ConfigError that shows no part of it that may be a password."""
    scheme, _, rest = url.partition("://")
    if (form := _FORMS.get(scheme)) is None:
        forms = ", ".join(form.example for form in _FORMS.values())
        raise ConfigError(f"a Redis URL has one of the forms {forms} (SLUICE_REDIS_URL, SLUICE_BROKER_URL)")
    malformed = ConfigError(
        f"a {scheme} URL has the form {form.example}; write / ? # and blanks in a user or password as %2F %3F %23 %20, a user "
        "without a password as `user:@`, an IPv6 address in brackets, and a port from 1 to 65535 (SLUICE_REDIS_URL, "
        "SLUICE_BROKER_URL)"
    )
    if (found := re.fullmatch(form.pattern, rest, re.ASCII)) is None:
        raise malformed
    parts = found.groupdict(default="")
    try:
        options = dict(parse_qsl(parts["query"], keep_blank_values=True, strict_parsing=bool(parts["query"])))
        hosts = tuple(_host_and_port(text, form.port) for text in parts.get("hosts", "").split(",") if text)
        database = int(parts.get("database") or options.get("db") or 0)
    except ValueError:
        raise malformed from None
    if unknown := [name for name in options if name not in form.options]:
        named = ", ".join(name for name in unknown if re.fullmatch("[a-z_]{1,40}", name)) or "others"
        known = f"the option {', '.join(form.options)} only" if form.options else "no option"
        raise ConfigError(f"a {scheme} URL takes {known}, not {named}: the form is {form.example}")
    user, _, password = parts["who"].partition(":")
    return Address(
        scheme=scheme,
        hosts=hosts,
        name=unquote(parts.get("name", "")),
        database=database,
        username=options.get("username") or unquote(user) or None,
        password=options.get("password") or unquote(password) or None,
        options=options,
        shown=_shown(url, who=parts["who"], user=user, options=options),
    )


def _shown(url: str, *, who: str, user: str, options: dict[str, str]) -> str:
    """Return a URL without passwords."""
    shown = url.partition("?")[0].replace(f"{who}@", f"{user}:***@", 1) if who else url.partition("?")[0]
    values = {name: "***" if "password" in name else value for name, value in options.items()}
    return shown + ("?" + "&".join(f"{name}={value}" for name, value in values.items()) if values else "")


def _host_and_port(text: str, default: int) -> tuple[str, int]:
    """Split `host:port`. Raises ValueError for a port that does not exist."""
    host, _, port = text.rpartition(":") if re.search(r":[0-9]+$", text) else (text, "", "")
    if not 0 < (number := int(port or default)) < 65536:
        raise ValueError(f"port {number}")
    return host.strip("[]"), number
