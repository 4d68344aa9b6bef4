"""Every completion that was trained on, as a table: what `log_completions` is elsewhere.

    <run folder>/completions/step-000012.parquet      one row per completion

Written into a temporary file and renamed, before the step can be in a checkpoint; a resumed trainer first removes the steps
that it will train again. So each trained completion is in the files once per step that trained on it, also after a kill. A
full disk costs files, never the run. The machine's own crash may cost the last files: they are not fsynced.
"""

from __future__ import annotations

import json
import logging
from contextlib import suppress
from pathlib import Path
from typing import Any

from sluice.common.types import Group

log = logging.getLogger("sluice.trainer")

_INTEGERS = {"step", "sample", "version_min", "version_max", "num_tokens"}
_TEXTS = {"group_id", "prompt", "target", "completion", "finish_reason"}
"""Columns by type, also where all their values are none; all others are float64."""


class CompletionsTable:
    """The files of one run."""

    def __init__(self, run_folder: Path) -> None:
        self._folder = run_folder / "completions"

    def write(self, step: int, groups: list[Group], advantages: list[list[float]]) -> None:
        """Write the completions of one step."""
        import pyarrow
        from pyarrow import parquet

        rows = [row for group, values in zip(groups, advantages, strict=True) for row in _rows(step, group, values)]
        types = {name: "int64" if name in _INTEGERS else "string" if name in _TEXTS else "float64" for name in rows[0]}
        types |= {name: "string" for row in rows for name in row if name.startswith("extra/")}
        schema = pyarrow.schema([(name, pyarrow.type_for_alias(kind)) for name, kind in types.items()])
        path = self._folder / f"step-{step:06d}.parquet"
        temporary = path.with_suffix(".tmp")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            parquet.write_table(pyarrow.Table.from_pylist(rows, schema=schema), temporary, compression="zstd")
            temporary.rename(path)
        except OSError as error:
            log.error("the completions of step %d were not written: %s", step, error)
            with suppress(OSError):
                temporary.unlink()

    def forget_after(self, step: int) -> None:
        """Remove the files after this step, from which the run resumes."""
        for path in self._folder.glob("step-*.parquet"):
            if int(path.stem.removeprefix("step-")) > step:
                path.unlink(missing_ok=True)


def _rows(step: int, group: Group, advantages: list[float]) -> list[dict[str, Any]]:
    prompt = group.prompt if isinstance(group.prompt, str) else json.dumps(group.prompt, ensure_ascii=False)
    rows = []
    for sample, (episode, advantage) in enumerate(zip(group.episodes, advantages, strict=True)):
        completion = episode.completion
        versions = [version for version, _ in completion.policy_versions]
        rows.append(
            {
                "step": step,
                "group_id": group.group_id,
                "sample": sample,
                "version_min": min(versions),
                "version_max": max(versions),
                "prompt": prompt,
                "target": group.target,
                "completion": completion.text,
                "reward": episode.reward,
                "advantage": advantage,
                "finish_reason": completion.finish_reason,
                "num_tokens": len(completion.token_ids),
                "generated_at": group.timestamps.get("rollout"),
                **{f"reward/{name}": score for name, score in episode.rewards.items()},
                **{f"extra/{name}": str(value) for name, value in episode.extra.items()},
            }
        )
    return rows
