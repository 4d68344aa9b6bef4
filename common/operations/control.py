"""Orders to a run while it goes on: pause, resume, drain, and settings other than those it was created with.

    hash `settings`       key of the config -> its value as JSON, where it differs from the stored config
    hash `run`            paused, draining: JSON {who, at}, while that is so
    stream `controls`     every change: at, who, step, key, old, new

The stored config is never rewritten. What holds is `effective`: the stored config with `settings` put in, checked as a
whole. All of it is in Redis, so that it outlives every process. A role that acts on one of these reads them again before each
thing it does with them: the dataset role before it admits, the trainer before it takes a batch.

    paused      nothing is admitted and no batch is taken; what is in flight is finished and kept, and grows no older
    draining    nothing is admitted; the trainer trains whole batches until fewer groups than one are left, and ends
"""

from __future__ import annotations

import getpass
import json
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from itertools import chain
from typing import Any

import redis
from pydantic import ValidationError

from sluice.common.config import Config
from sluice.common.config.file import parse_config
from sluice.common.errors import ConfigError
from sluice.common.keys import Keys
from sluice.common.ledger.scripts import Scripts
from sluice.common.run import Run

SHORT = {"max_policy_age": "replay_buffer.max_policy_age", "learning_rate": "trainer.learning_rate"}
"""Names that `sluice set` takes for longer ones."""
CHANGEABLE = {
    "replay_buffer.max_policy_age": "the next admission and the next batch; groups that are too old by it are dropped then",
    "replay_buffer.max_bytes": "the next admission",
    "trainer.learning_rate": "the next step",
    "trainer.max_grad_norm": "the next step",
    "trainer.loss.clip_low": "the next step",
    "trainer.loss.clip_high": "the next step",
    "trainer.loss.kl_beta": "the next step; it stays over 0, or 0: that decides whether references are computed",
    "trainer.num_steps": "the next step; a schedule that ends at num_steps ends at the new one",
    "sampling.temperature": "groups admitted from now on; each is trained at the temperature it was sampled at",
    "sampling.top_p": "as sampling.temperature",
    "sampling.top_k": "as sampling.temperature",
    "sampling.min_p": "as sampling.temperature",
    "evaluation.every_steps": "the next step",
    "checkpoint.every_steps": "the next step",
}
"""Keys that a running run can change, and from when on."""
_ATTEMPTS = 20
"How often a change is judged again because somebody else was faster."


@dataclass(frozen=True, kw_only=True, slots=True)
class ControlState:
    """One reading of what a run was told."""

    settings: dict[str, str] = field(default_factory=dict)
    paused: dict[str, Any] | None = None
    "{who, at: seconds since the epoch}"
    draining: dict[str, Any] | None = None
    change_log: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    "(entry id, {at, who, step, key, old, new}), oldest first"


def read_control_state(client: redis.Redis, keys: Keys, *, after: str = "-") -> ControlState:
    """Everything in one round trip; of the trail what follows an entry id."""
    with client.pipeline(transaction=False) as pipe:
        pipe.hgetall(keys("settings"))
        pipe.hmget(keys("run"), ["paused", "draining"])
        pipe.xrange(keys("controls"), min=after if after == "-" else f"({after}")
        settings, (paused, draining), entries = pipe.execute()
    return ControlState(
        settings=_text(settings),
        paused=json.loads(paused) if paused else None,
        draining=json.loads(draining) if draining else None,
        change_log=[(entry.decode(), _text(fields)) for entry, fields in entries],
    )


def with_settings(config: Config, settings: Mapping[str, str]) -> Config:
    """A stored config with what was set since. Raises ConfigError when they do not go together."""
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
    except ValidationError as error:  # `change` checks: somebody wrote into the hash by hand
        raise ConfigError(f"the settings in force do not fit the run's config: {error}") from None


def effective(client: redis.Redis, run: Run) -> Config:
    """The config that the run goes by now."""
    return with_settings(run.config, _text(client.hgetall(run.keys("settings"))))


def pause(client: redis.Redis, run: Run, *, who: str) -> bool:
    """Hold admission and training. False: it was paused already."""
    return _order(client, run, who, _mark(client, "paused", who)) > 0


def resume(client: redis.Redis, run: Run, *, who: str) -> bool:
    """Undo pause and drain. False: neither was so."""
    return _order(client, run, who, _unmark("paused"), _unmark("draining")) > 0


def cancel_drain(client: redis.Redis, run: Run, *, who: str) -> None:
    """A drained run is gone on with; a pause stays. Nothing for one that was finished while it was draining."""
    draining, status = client.hmget(run.keys("run"), ["draining", "status"])
    if draining and status != b"finished":
        _order(client, run, who, _unmark("draining"))


def drain(client: redis.Redis, run: Run, *, who: str) -> bool:
    """End in good order once what is in flight is trained; a pause is lifted. False: it was draining already."""
    return _order(client, run, who, _mark(client, "draining", who), _unmark("paused")) > 0


def change(client: redis.Redis, run: Run, assignments: list[str], *, who: str) -> Config:
    """`key=value` settings, all or none; the config that holds then. Raises ConfigError, which says what can be set to what."""
    asked = dict(_parse(assignment) for assignment in assignments)
    for _ in range(_ATTEMPTS):
        settings = _text(client.hgetall(run.keys("settings")))
        before = with_settings(run.config, settings)
        after = _checked(client, run, before, asked)
        changes = [_setting(run.config, before, after, key) for key in asked]
        if _order(client, run, who, *changes, seen=settings) >= 0:
            return after
    raise ConfigError(f"the settings of run {run.name} were changed by others {_ATTEMPTS} times meanwhile: try again")


def at(config: Config, key: str) -> Any:
    """The value of a dotted key."""
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def describe_paused(paused: Mapping[str, Any]) -> str:
    """Who and since when, for people."""
    return f"paused by {paused['who']} since {datetime.fromtimestamp(paused['at']):%Y-%m-%d %H:%M:%S}: `sluice resume`"


def default_who() -> str:
    """SLUICE_WHO, else user@host."""
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
            f"{key} cannot be changed while a run goes on; these can: {', '.join(CHANGEABLE)}. For another value create a "
            "new run (model.path=TARGET of `sluice export` begins with this one's policy)"
        )
    return key, value


def _checked(client: redis.Redis, run: Run, before: Config, asked: Mapping[str, str]) -> Config:
    """The config with these changes. Raises ConfigError for one that is out of range or would have no sound effect."""
    overrides = [f"{key}={value}" for key, value in asked.items()]
    after = parse_config(before.to_yaml(), overrides=overrides, source=f"run {run.name}")
    if after.stages != before.stages:
        raise ConfigError(
            f"trainer.loss.kl_beta = {after.trainer.loss.kl_beta:g}: 0 or not decides whether references are computed, which "
            "cannot change while a run goes on; stay over 0"
        )
    if after.rollout.engine == "vllm" and not 0.01 <= after.sampling.temperature <= 2.0:
        raise ConfigError(f"sampling.temperature = {after.sampling.temperature:g}: vLLM samples at 0.01 to 2.0")
    step = int(client.hget(run.keys("policy"), "step") or 0)
    if after.trainer.num_steps != before.trainer.num_steps and after.trainer.num_steps <= step:
        raise ConfigError(f"trainer.num_steps = {after.trainer.num_steps}: step {step} is trained already; set more")
    if after.trainer.num_steps != before.trainer.num_steps and before.trainer.num_steps <= step:
        raise ConfigError(f"run {run.name} has trained its last step, {step}: trainer.num_steps has no effect any more")
    return after


def _order(
    client: redis.Redis, run: Run, who: str, *changes: tuple[str, ...], seen: Mapping[str, str] | None = None
) -> int:
    """Changes made; -1: the settings are not those `seen` any more. Raises ConfigError for a run that has ended."""
    judged = [-1] if seen is None else [len(seen), *chain.from_iterable(seen.items())]
    state, *rest = Scripts(client, run.keys)("control", who, *judged, *chain.from_iterable(changes))
    if state == b"refused":
        raise ConfigError(f"run {run.name} is {rest[0].decode() or 'gone'}: there is nothing to change any more")
    return -1 if state == b"moved" else int(rest[0])


def _setting(stored: Config, before: Config, after: Config, key: str) -> tuple[str, ...]:
    old, new = _json(at(before, key)), _json(at(after, key))
    return ("settings", key, "" if new == _json(at(stored, key)) else new, key, old, new)


def _mark(client: redis.Redis, name: str, who: str) -> tuple[str, ...]:
    seconds, microseconds = client.time()
    return ("run", name, _json({"who": who, "at": seconds + microseconds / 1e6}), name, "false", "true")


def _unmark(name: str) -> tuple[str, ...]:
    return ("run", name, "", name, "true", "false")


def _json(value: Any) -> str:
    return json.dumps(value)


def _text(fields: Mapping[bytes, bytes]) -> dict[str, str]:
    return {name.decode(): value.decode() for name, value in fields.items()}
