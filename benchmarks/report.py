"""How a benchmark says what it found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def publish(report: dict[str, Any], out: str | Path | None) -> None:
    """One JSON object on standard output, and in the file `out` where one is named."""
    text = json.dumps(report, indent=1)
    print(text)
    if out:
        Path(out).write_text(text + "\n")
