"""Control of a running run: pause, resume, drain, and settings other than those it was created with.

    hash `settings`       key of the config -> its value as JSON, where it differs from the stored config
    hash `run`            paused, draining: JSON {who, at}, while that is so
    stream `controls`     the change log: at, who, step, key, old, new

The stored config is never rewritten. In force is `effective`: the stored config with `settings` applied, validated again. All
of it is in Redis, so it outlives every process. Roles read it anew before they act on it: the dataset role before it admits,
the trainer before it samples a batch.

    paused      nothing is admitted and no batch is sampled; groups in flight are finished and kept, and grow no older
    draining    nothing is admitted; the trainer trains full batches until fewer groups than one are left, and ends
"""

from __future__ import annotations

import getpass
import json
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import reduce
from itertools import chain
from typing import Any

import redis
from pydantic import ValidationError

from sluice.common.config import Config
from sluice.common.config.file import parse_config
from sluice.common.errors import ConfigError
from sluice.common.keys import Keys
from sluice.common.ledger.scripts import Scripts
from sluice.common.pipeline import stages_for
from sluice.common.policies.lineage import read_pointer
from sluice.common.run import Run, RunRecord

SHORT = {"max_policy_age": "replay_buffer.max_policy_age", "learning_rate": "trainer.learning_rate"}
"""Short names that `sluice set` accepts."""
CHANGEABLE = {
    "replay_buffer.max_policy_age": "the next admission and the next batch, which drops groups that are older",
    "replay_buffer.max_bytes": "the next admission",
    "trainer.learning_rate": "the next step",
    "trainer.max_grad_norm": "the next step",
    "trainer.loss.clip_low": "the next step",
    "trainer.loss.clip_high": "the next step",
    "trainer.loss.kl_beta": "the next step; not from or to 0, which decides whether references are computed",
    "trainer.num_steps": "the next step; a schedule that ends at num_steps ends at the new one",
    "sampling.temperature": "groups admitted from now on; each is trained at the temperature it was sampled at",
    "sampling.top_p": "as sampling.temperature",
    "sampling.top_k": "as sampling.temperature",
    "sampling.min_p": "as sampling.temperature",
    "evaluation.every_steps": "the next step",
    "checkpoint.every_steps": "the next step",
}
"""Keys that can be changed during a run -> when the change takes effect."""
_ATTEMPTS = 20
"How often a change is tried again because another operator was faster."


@dataclass(frozen=True, kw_only=True, slots=True)
class ControlState:
    """A snapshot of the control state of a run."""

    settings: dict[str, str] = field(default_factory=dict)
    paused: dict[str, Any] | None = None
    "{who, at: seconds since the epoch}"
    draining: dict[str, Any] | None = None
    change_log: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    "(entry id, {at, who, step, key, old, new}), oldest first"


def read_control_state(client: redis.Redis, keys: Keys, *, after: str = "0") -> ControlState:
    """Read the control state, with the change log after an entry id."""
    settings, (paused, draining) = read_settings(client, keys), RunRecord(client, keys).held()
    entries = client.xrange(keys.controls, min=f"({after}")
    log = [(entry.decode(), _text(fields)) for entry, fields in entries]
    return ControlState(settings=settings, paused=paused, draining=draining, change_log=log)


def read_settings(client: redis.Redis, keys: Keys) -> dict[str, str]:
    """Return key of the config -> JSON, where it differs from the stored config."""
    return _text(client.hgetall(keys.settings))


def with_settings(config: Config, settings: Mapping[str, str]) -> Config:
    """Return a stored config with the settings applied. Raises ConfigError when the result is invalid."""
    if not settings:
        return config
    data = config.model_dump()
    for key, value in settings.items():
        *sections, last = key.split(".")
        section = data
        for name in sections:
            section = section[name]
        section[last] = json.loads(value)
    try:
        return Config.model_validate(data)
    except ValidationError as error:  # `change` validates: the hash was edited by hand
        raise ConfigError(f"the settings in force do not fit the run's config: {error}") from None


def effective(client: redis.Redis, run: Run) -> Config:
    """Return the config in force."""
    return with_settings(run.config, read_settings(client, run.keys))


def pause(client: redis.Redis, run: Run, *, who: str) -> bool:
    """Pause admission and training. False: it was paused already."""
    return _apply(client, run, who, _set(client, "paused", who)) > 0


def resume(client: redis.Redis, run: Run, *, who: str) -> bool:
    """Undo pause and drain. False: neither was so."""
    return _apply(client, run, who, _clear("paused"), _clear("draining")) > 0


def cancel_drain(client: redis.Redis, run: Run, *, who: str) -> None:
    """Undo the drain of a run that is resumed; a pause stays. Does nothing if it was finished while it was draining."""
    record = RunRecord(client, run.keys)
    _, draining = record.held()
    if draining and record.status != "finished":
        _apply(client, run, who, _clear("draining"))


def drain(client: redis.Redis, run: Run, *, who: str) -> bool:
    """End gracefully once the groups in flight are trained; undo a pause. False: it was draining already."""
    return _apply(client, run, who, _set(client, "draining", who), _clear("paused")) > 0


def change(client: redis.Redis, run: Run, assignments: list[str], *, who: str) -> Config:
    """Change `key=value` settings, all or none. Returns the config in force. Raises ConfigError, which names valid settings."""
    asked = dict(_parse(assignment) for assignment in assignments)
    for _ in range(_ATTEMPTS):
        settings = read_settings(client, run.keys)
        before = with_settings(run.config, settings)
        after = _checked(client, run, before, asked)
        changes = [_setting(run.config, before, after, key) for key in asked]
        if _apply(client, run, who, *changes, seen=settings) >= 0:
            return after
    raise ConfigError(f"the settings of run {run.name} were changed by others {_ATTEMPTS} times meanwhile: try again")


def at(config: Config, key: str) -> Any:
    """Return the value of a dotted key."""
    return reduce(getattr, key.split("."), config)


def describe_paused(paused: Mapping[str, Any]) -> str:
    """Say who paused a run, and since when."""
    return f"paused by {paused['who']} since {datetime.fromtimestamp(paused['at']):%Y-%m-%d %H:%M:%S}: `sluice resume`"


def default_who() -> str:
    """Return SLUICE_WHO, else user@host."""
    if who := os.environ.get("SLUICE_WHO"):
        return who
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


def _parse(assignment: str) -> tuple[str, str]:
    key, equals, value = assignment.partition("=")
    key = SHORT.get(key.strip(), key.strip())
    if not equals or not value.strip():
        raise ConfigError(f"{assignment!r} is not of the form key=value")
    if key not in CHANGEABLE:
        raise ConfigError(
            f"{key} cannot be changed during a run; these can: {', '.join(CHANGEABLE)}. For another value create a "
            "new run (model.path=TARGET of `sluice export` starts from this one's policy)"
        )
    return key, value


def _checked(client: redis.Redis, run: Run, before: Config, asked: Mapping[str, str]) -> Config:
    """Return the config with these changes. Raises ConfigError for a value out of range, or one that cannot take effect."""
    overrides = [f"{key}={value}" for key, value in asked.items()]
    after = parse_config(before.to_yaml(), overrides=overrides, source=f"run {run.name}")
    if stages_for(after) != stages_for(before):
        raise ConfigError(
            f"trainer.loss.kl_beta = {after.trainer.loss.kl_beta:g}: 0 or not decides whether references are computed, which "
            "cannot change during a run; stay over 0"
        )
    if after.rollout.engine == "vllm" and not 0.01 <= after.sampling.temperature <= 2.0:
        raise ConfigError(f"sampling.temperature = {after.sampling.temperature:g}: vLLM samples at 0.01 to 2.0")
    step = int(read_pointer(client, run.keys).get("step", 0))
    if after.trainer.num_steps != before.trainer.num_steps and after.trainer.num_steps <= step:
        raise ConfigError(f"trainer.num_steps = {after.trainer.num_steps}: step {step} is trained already; set more")
    if after.trainer.num_steps != before.trainer.num_steps and before.trainer.num_steps <= step:
        raise ConfigError(f"run {run.name} has trained its last step, {step}: trainer.num_steps has no effect any more")
    return after


def _apply(
    client: redis.Redis, run: Run, who: str, *changes: tuple[str, ...], seen: Mapping[str, str] | None = None
) -> int:
    """Return the number of changes made; -1: the settings differ from `seen`. Raises ConfigError for a run that has ended."""
    expected = [-1] if seen is None else [len(seen), *chain.from_iterable(seen.items())]
    state, *rest = Scripts(client, run.keys)("control", who, *expected, *chain.from_iterable(changes))
    if state == b"refused":
        raise ConfigError(f"run {run.name} is {rest[0].decode() or 'gone'}: there is nothing to change any more")
    return -1 if state == b"moved" else int(rest[0])


def _setting(stored: Config, before: Config, after: Config, key: str) -> tuple[str, ...]:
    old, new = json.dumps(at(before, key)), json.dumps(at(after, key))
    return ("setting", key, "" if new == json.dumps(at(stored, key)) else new, key, old, new)


def _set(client: redis.Redis, name: str, who: str) -> tuple[str, ...]:
    seconds, microseconds = client.time()
    return ("state", name, json.dumps({"who": who, "at": seconds + microseconds / 1e6}), name, "false", "true")


def _clear(name: str) -> tuple[str, ...]:
    return ("state", name, "", name, "true", "false")


def _text(fields: Mapping[bytes, bytes]) -> dict[str, str]:
    return {name.decode(): value.decode() for name, value in fields.items()}
