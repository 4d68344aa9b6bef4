"""Secrets: from the environment, or from a file that it names; nowhere else, and never in what is logged or stored."""

from __future__ import annotations

import os

from sluice.common.errors import ConfigError
from sluice.common.paths import expanded


def secret(name: str) -> str | None:
    """Return the value of NAME, else the content of the file that NAME_FILE names; None where neither is set.

    An empty variable counts as not set, so that a role can be started without a secret that its parent has.
    Raises ConfigError for both at once, and for a file that cannot be read or is empty.
    """
    value, file = os.environ.get(name), os.environ.get(f"{name}_FILE")
    if value and file:
        raise ConfigError(f"{name} and {name}_FILE are both set: unset one of them")
    if not file:
        return value or None
    try:
        content = expanded(file).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise ConfigError(f"{name}_FILE={file} cannot be read: {reason}") from None
    if not content:
        raise ConfigError(f"{name}_FILE={file} is empty")
    return content
