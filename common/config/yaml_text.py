"""YAML of configs: values as YAML 1.2 has them, text where a key holds text, and no key twice.

Only `true` and `false` are booleans, and no plain word is a date or a number in base 60 or 8; keys that hold a boolean take
`on`, `off`, `yes` and `no` as well. A scalar without quotes keeps its text until the schema says what is meant, so that
`revision: 0123`, `split: no` and `name: 1.0` are what stands in the file.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from types import NoneType
from typing import Any, ClassVar, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel

_NULLS = ("", "~", "null", "Null", "NULL")
_TAG = "tag:yaml.org,2002:"
_MAX_VALUES = 1_000_000


@dataclass(frozen=True, slots=True)
class Scalar:
    """What stands without quotes, and what YAML reads it as."""

    value: Any
    "a ValueError where the text is no YAML"
    text: str


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - as in its base
    # Of the tags only these: no dates, sets or bytes, which no key holds.
    yaml_constructors: ClassVar[dict[Any, Any]] = {
        tag: yaml.SafeLoader.yaml_constructors[tag] for tag in (None, f"{_TAG}str", f"{_TAG}seq", f"{_TAG}map")
    }

    def compose_scalar_node(self, anchor: Any) -> yaml.ScalarNode:
        node: yaml.ScalarNode = super().compose_scalar_node(anchor)
        try:
            # JSON writes what is beyond 16 bits as two halves.
            node.value = node.value.encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError:
            raise yaml.MarkedYAMLError(None, None, "half a surrogate pair", node.start_mark) from None
        if "\0" in node.value:
            raise yaml.MarkedYAMLError(None, None, "text with a null byte", node.start_mark)
        return node

    def construct_document(self, node: yaml.Node) -> Any:
        # Ten lines of aliases of aliases are a thousand million values.
        if _expanded(node, {}) > _MAX_VALUES:
            raise yaml.YAMLError(f"aliases (*) repeat it to more than {_MAX_VALUES:,} values")
        return super().construct_document(node)

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line, name = key.start_mark.line + 1, str(key.value)
            if name in lines:
                both = f"lines {lines[name]} and {line}" if lines[name] != line else f"line {line}, twice"
                raise yaml.YAMLError(
                    f"the key {name!r} is on {both}: the second would replace the first, make them one"
                )
            lines[name] = line
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != f"{_TAG}merge":
                key.tag = f"{_TAG}str"  # a key is a name
        return super().construct_mapping(node, deep)

    def _scalar(self, node: yaml.ScalarNode) -> Scalar:
        kind, text = node.tag.removeprefix(_TAG), str(node.value)
        if kind == "null":
            return Scalar(None, text)
        if kind == "bool":
            return Scalar(text.lower() == "true", text)
        if kind == "float":
            return Scalar(float(re.sub(r"\.(?=[in])", "", text, flags=re.IGNORECASE)), text)
        return Scalar(int(text, 0) if text[:2] in ("0o", "0x") else int(text), text)


def _expanded(node: yaml.Node, known: dict[yaml.Node, int]) -> int:
    """Return how many values a node is once every alias is replaced by what it names; a cycle counts once."""
    if node not in known:
        known[node] = 1
        children: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            children = [item for pair in node.value for item in pair]
        elif isinstance(node, yaml.SequenceNode):
            children = node.value
        known[node] += sum(_expanded(child, known) for child in children)
    return known[node]


class _Dumper(yaml.SafeDumper):
    """Quotes what either version of YAML would not read as text."""


for _kind, _pattern, _first in (
    ("null", r"(~|null|Null|NULL|)$", ("~", "n", "N", "")),
    ("bool", r"(true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("int", r"([-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$", "-+0123456789"),
    (
        "float",
        r"([-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$",
        "-+.0123456789",
    ),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"{_TAG}{_kind}", re.compile(_pattern), list(_first))
    _Loader.add_constructor(f"{_TAG}{_kind}", _Loader._scalar)
_Loader.add_implicit_resolver(f"{_TAG}merge", re.compile("<<$"), ["<"])


def load_yaml(text: str) -> Any:
    """Read one document; scalars without quotes are a `Scalar` or text. Raises ValueError, of one line."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(where + " ".join(f"{error.problem or ''} {error.context or ''}".split())) from None
    except RecursionError:
        raise ValueError("lists or mappings are nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(" ".join(str(error).split())) from None


def dump_yaml(data: dict[str, Any]) -> str:
    """Return what `load_yaml` and other readers of YAML read as the same data."""
    text: str = yaml.dump(data, Dumper=_Dumper, sort_keys=False)
    return text


def as_meant(value: Any, annotation: Any = Any) -> Any:
    """Replace every `Scalar` by its text where the annotation has text only, by its value elsewhere.

    A key without a value is left out where it cannot be null: its default holds, as it does for a section without keys.
    """
    kinds = _kinds(annotation)
    if isinstance(value, Scalar):
        if value.value is None and value.text.strip() in _NULLS:
            return None
        is_list = isinstance(value.value, list) and tuple in kinds
        is_text = str in kinds and not kinds & {bool, int, float, Any} and not is_list
        if isinstance(value.value, ValueError) and (tuple in kinds or not is_text):
            raise value.value
        return value.text if is_text else as_meant(value.value, annotation)
    if isinstance(value, list):
        return [as_meant(item, annotation) for item in value]
    if isinstance(value, dict):
        models = _models(kinds)
        fields = {name: field.annotation for model in models for name, field in model.model_fields.items()}
        rest = Any if models or Any in kinds else annotation
        meant = {key: fields.get(key, rest) for key in value}
        return {key: as_meant(item, meant[key]) for key, item in value.items() if not _is_left_out(item, meant[key])}
    return value


def _is_left_out(value: Any, annotation: Any) -> bool:
    if not isinstance(value, Scalar) or value.value is not None or annotation is Any:
        return False
    kinds = _kinds(annotation)
    return NoneType not in kinds and (value.text == "" or bool(_models(kinds)))


def _models(kinds: set[Any]) -> list[type[BaseModel]]:
    return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]


def _kinds(annotation: Any) -> set[Any]:
    """Return the types that an annotation consists of, containers and what they hold; of a literal, those of its values."""
    arguments = get_args(annotation)
    if get_origin(annotation) is Literal:
        return {type(argument) for argument in arguments}
    nested = (_kinds(argument) for argument in arguments if isinstance(argument, type) or get_args(argument))
    return {get_origin(annotation) or annotation}.union(*nested)
