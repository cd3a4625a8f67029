"""Values as papermill and YAML give them, converted to the types that a parameters cell or a dataclass writes."""

import re
import types
import typing
from typing import Any

import yaml


def convert(value: Any, hint: Any) -> Any:
    """VALUE as HINT: the value itself, an int as float, a list as tuple; TypeError where it is neither."""
    kind, arguments = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind is Any:
        return value
    if kind in (typing.Union, types.UnionType):
        return _convert_to_one_of(value, arguments)
    if kind is list and isinstance(value, list):
        return [convert(item, arguments[0]) for item in value] if arguments else value
    if kind is tuple and isinstance(value, list | tuple):
        hints = arguments[:1] * len(value) if arguments[1:] == (...,) else arguments or (Any,) * len(value)
        if len(hints) == len(value):
            return tuple(convert(item, own) for item, own in zip(value, hints, strict=True))
    if kind is dict and isinstance(value, dict):
        key, item = arguments or (Any, Any)
        return {convert(k, key): convert(v, item) for k, v in value.items()}
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if kind is typing.Literal:
        fits = any(value == option and type(value) is type(option) for option in arguments)
    elif kind is int:
        fits = isinstance(value, int) and not isinstance(value, bool)
    else:
        fits = value is None if kind is None else isinstance(hint, type) and isinstance(value, hint)
    if not fits:
        raise TypeError
    return value


def _convert_to_one_of(value: Any, options: tuple[Any, ...]) -> Any:
    """VALUE as the first of a union's types that takes it, its own type before all."""
    exact = [option for option in options if type(value) is (typing.get_origin(option) or option)]
    for option in (*exact, *options):
        try:
            return convert(value, option)
        except TypeError:
            continue
    raise TypeError


def parse(text: str, hint: Any) -> Any:
    """TEXT, typed on the command line, as HINT; what is no such value comes back for `convert` to refuse.

    A text is taken as it stands; numbers may be written 1e3; None, null and ~ are None where the type allows it; lists,
    tuples and mappings are YAML, their items read by their own types.
    """
    for option in _options(hint):
        value = _parsed(text, option)
        try:
            return convert(value, option)
        except TypeError:
            continue
    return value


def _options(hint: Any) -> list[Any]:
    """The types of a union, None first and text last, which takes anything."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return sorted(typing.get_args(hint) if union else (hint,), key=lambda one: (one is str) - (one is type(None)))


def _parsed(text: str, hint: Any) -> Any:
    origin, arguments = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin is typing.Literal:
        return next((option for option in arguments if str(option) == text), text)
    if hint in (None, type(None)):
        return None if text.strip().lower() in ("none", "null", "~", "") else text
    if hint is bool:
        return {"true": True, "yes": True, "false": False, "no": False}.get(text.strip().lower(), text)
    if hint in (int, float):
        try:
            number = float(text)
            return number if hint is float else int(text) if text.strip().lstrip("+-").isdecimal() else _whole(number)
        except ValueError:
            return text
    if origin in (list, tuple, dict) or hint is Any:
        return _items(_yaml(text), hint)
    return text


def _whole(number: float) -> int | float:
    return int(number) if number.is_integer() else number


def _yaml(text: str) -> Any:
    try:
        return yaml.load(text, PlainLoader)
    except yaml.YAMLError:
        return text


def _items(value: Any, hint: Any) -> Any:
    """The texts in a YAML value (1e-4 is one) as the types of their places."""
    arguments = typing.get_args(hint)
    if isinstance(value, list) and arguments:
        hints = arguments if len(arguments) == len(value) and ... not in arguments else arguments[:1] * len(value)
        return [_items(item, one) for item, one in zip(value, hints, strict=True)]
    if isinstance(value, dict) and arguments:
        return {key: _items(item, arguments[-1]) for key, item in value.items()}
    return parse(value, hint) if isinstance(value, str) and hint not in (Any, list, tuple, dict) else value


class PlainLoader(yaml.SafeLoader):
    """YAML in which a date is text, as a folder may be named 2026-11-26, and so are YAML 1.1's numbers of other bases
    (12:00 was 720, and 010 was 8); a key that stands twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.MarkedYAMLError(problem=f"the key {twice[0]!r} stands twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in ("timestamp", "int", "float")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_NUMBERS = {
    "int": r"[-+]?(0|[1-9][0-9_]*)",
    "float": r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)([eE][-+][0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}
for _kind, _pattern in _NUMBERS.items():
    PlainLoader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_kind}", re.compile(f"^({_pattern})$"), list("-+.0123456789")
    )


def spell(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")


def advice(value: Any, hint: Any) -> str:
    """What to write instead, for the values that YAML and the command line are known to misread."""
    wanted = set(typing.get_args(hint)) | {hint}
    if isinstance(value, str) and wanted & {int, float}:
        try:
            number = float(value)
        except ValueError:
            return ""
        return f" (a string: YAML reads a number without a point as text, so write {_yaml_number(number)})"
    if isinstance(value, str) and bool in wanted and value.lower() in ("true", "false", "yes", "no"):
        return " (a string: write True or False, in YAML true or false without quotes)"
    if isinstance(value, bool | int | float) and str in wanted:
        return " (put it in quotes in YAML; on papermill's command line give it with -r instead of -p)"
    return ""


def _yaml_number(number: float) -> str:
    mantissa, mark, exponent = repr(number).partition("e")
    return f"{mantissa if '.' in mantissa else mantissa + '.0'}e{exponent}" if mark else repr(number)
