"""What a program calls `sluice.train` with, as a run folder that is ready to be run: config, reward functions, rows.

<run folder>/run.yaml              the config, with every default: `sluice run runs/x/run.yaml --resume x` continues the run
<run folder>/rewards_<hash>.py     functions of the program (functions.py)
<run folder>/rows.jsonl, .parquet  rows of the program (rows.py)
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from sluice.common.config import Config
from sluice.common.config.file import load_config, parse_config
from sluice.common.errors import ConfigError
from sluice.common.keys import Keys
from sluice.common.paths import with_absolute_paths
from sluice.scripts.api.functions import FoundReward, find_reward
from sluice.scripts.api.rows import GivenRows, given_rows
from sluice.scripts.launcher.run_folder import new_folder, run_folder

Reward = Callable[..., Any] | str | Mapping[str, Any]
"""A function or class; a short name or a path; or an entry of `reward.functions`, whose `function` is any of these."""


class Call:
    """One call, checked as far as that goes without a model."""

    def __init__(
        self,
        *,
        model: str | PathLike[str] | None = None,
        dataset: object = None,
        rewards: Reward | Sequence[Reward] | None = None,
        steps: int | None = None,
        group_size: int | None = None,
        config: str | PathLike[str] | None = None,
        settings: Mapping[str, Any],
    ) -> None:
        """Check what was given. Raises ConfigError for what cannot be run."""
        self._config_path = None if config is None else str(config)
        self._rows = None if dataset is None else given_rows(dataset)
        self._rewards = [] if rewards is None else [*_found(rewards)]
        given = {"model.path": model, "trainer.num_steps": steps, "sampling.group_size": group_size}
        self._settings: dict[str, Any] = {
            key: str(value) if key == "model.path" else value for key, value in given.items() if value is not None
        }
        for key, value in dotted(settings):
            if key in self._settings:
                raise ConfigError(f"sluice.train: {key} is given twice: leave one of the two out")
            self._settings[key] = value
        self._functions = {
            key: find_reward(value, where=key) for key, value in self._settings.items() if callable(value)
        }
        self._add_what_follows()
        self.config = self._resolved(Path("."))

    def _add_what_follows(self) -> None:
        """Say where imported functions are found, and that rows without a target have none where only functions score them."""
        folders = frozenset[str]().union(*(found.folders for found in self._all_found()))
        if len(folders) > 1:
            raise ConfigError(
                f"sluice.train: its functions are imported from {', '.join(sorted(folders))}, and a run has one folder of code: "
                "put them into one, or install them"
            )
        if folders:
            self._settings.setdefault("code_folder", *folders)
        is_scored_by_functions = bool(self._rewards) and all(found for _, found in self._rewards)
        has_target = not isinstance(self._rows, GivenRows) or "target" in self._rows.columns
        if self._config_path is None and is_scored_by_functions and not has_target:
            self._settings.setdefault("dataset.target_column", None)

    def _all_found(self) -> list[FoundReward]:
        return [*self._functions.values(), *(found for _, found in self._rewards if found)]

    def make_folder(self, name: str | None) -> Path:
        """Make the run folder and write what is in it; return it. Raises ConfigError."""
        if name:
            folder = run_folder(self.config, Keys(name).run)
            try:
                folder.mkdir(parents=True)
            except FileExistsError:
                raise ConfigError(
                    f"run name {name!r} is in use: {folder} exists; choose another, or give resume={str(folder)!r}"
                ) from None
        else:
            folder = new_folder(self.config, self._config_path or f"{_word(self.config.model.path)}.yaml")
        folder.chmod(0o700)
        if isinstance(self._rows, GivenRows):
            self._rows.write(folder / self._rows.file)
        for found in self._all_found():
            for file, text in found.files.items():
                (folder / file).write_text(text)
        (folder / "run.yaml").write_text(self._resolved(folder).to_yaml())
        for path in folder.iterdir():
            path.chmod(0o600)
        return folder

    def _resolved(self, folder: Path) -> Config:
        """Return the config with the files of this call in a folder. Raises ConfigError."""
        settings = self._settings | {key: found.path_in(folder) for key, found in self._functions.items()}
        if self._rows is not None:
            settings["dataset.path"] = self._rows if isinstance(self._rows, str) else str(folder / self._rows.file)
        if self._rewards:
            settings["reward.functions"] = [
                entry | ({"function": found.path_in(folder)} if found else {}) for entry, found in self._rewards
            ]
        overrides = [f"{key}={_yaml(key, value)}" for key, value in settings.items()]
        if self._config_path is not None:
            return with_absolute_paths(load_config(self._config_path, overrides))
        overrides += [] if "code_folder" in settings else [f"code_folder={json.dumps(str(Path.cwd()))}"]
        return with_absolute_paths(parse_config("{}", overrides=overrides, source="sluice.train"))


def _found(rewards: Reward | Sequence[Reward]) -> Iterator[tuple[dict[str, Any], FoundReward | None]]:
    """Yield each entry of `reward.functions`, and where its function is found, unless it was given as text."""
    several: Any = rewards if isinstance(rewards, Sequence) and not isinstance(rewards, str) else [rewards]
    for number, reward in enumerate(several):
        entry = dict(reward) if isinstance(reward, Mapping) else {"function": reward}
        function = entry.get("function")
        if isinstance(function, (str, PathLike)) or function is None:
            yield entry | ({"function": str(function)} if function else {}), None
            continue
        found = find_reward(function, where=f"rewards[{number}]")
        if getattr(function, "__name__", "") == "<lambda>":
            entry.setdefault("name", found.path.rpartition(":")[2])
        yield entry, found


def _yaml(key: str, value: Any) -> str:
    """Return a value as text that YAML reads as the same. Raises ConfigError."""

    def plain(value: Any) -> Any:
        if isinstance(value, PathLike):
            return str(value)
        if hasattr(value, "tolist"):  # a number of numpy
            return value.tolist()
        raise ConfigError(
            f"{key}: an object of type {type(value).__name__} is no value of a config; give text, numbers and lists"
        )

    return json.dumps(value, ensure_ascii=False, default=plain)


def dotted(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield dotted key and value of `trainer__lr=`, of `**{"trainer.lr": ...}`, and of a section or `settings` as a dict."""
    for name, value in settings.items():
        key = name.replace("__", ".")
        if isinstance(value, Mapping) and "." not in key:
            yield from dotted({inner if key == "settings" else f"{key}.{inner}": each for inner, each in value.items()})
        else:
            yield key, value


def _word(model: str) -> str:
    """Return what the runs of a model are called."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", Path(model).name)[:60].strip("-._") or "run"
