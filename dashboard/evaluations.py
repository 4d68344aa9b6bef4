"""A finished evaluation as a line."""

from __future__ import annotations

from typing import Any


def describe(entry: dict[str, Any]) -> str:
    """Describe an entry of `evaluations.read_all` in one line: every score with its standard error, length, clipped share, and
    what reward functions logged."""
    words = [f"eval {entry['dataset']} at step {entry['step']}:"]
    for name, value in entry.items():
        if value is None or name.endswith("_stderr") or "@" not in name:
            continue
        error = entry[f"{name}_stderr"]
        words.append(f"{name} {value:.3f}" + ("" if error is None else f"±{error:.3f}"))
    if entry["mean_length"] is not None:
        words.append(f"length {entry['mean_length']:.1f}  clipped {entry['clipped_ratio']:.3f}")
    words += [f"{name} {value:.4g}" for name, value in entry["logged"].items() if value is not None]
    if entry["num_dead"]:
        words.append(f"dead {entry['num_dead']} of {entry['num_asked']}")
    return "  ".join([*words, *(["best"] if entry["best"] else [])])
