"""Values as papermill and YAML give them, converted to the types that a parameters cell or a dataclass writes."""

import types
import typing
from typing import Any


def convert(value: Any, hint: Any) -> Any:
    """VALUE as HINT: the value itself, an int as float, a list as tuple; TypeError where it is neither."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        exact = [option for option in arguments if type(value) is (typing.get_origin(option) or option)]
        for option in (*exact, *arguments):
            try:
                return convert(value, option)
            except TypeError:
                continue
    elif origin is typing.Literal:
        if any(value == option and type(value) is type(option) for option in arguments):
            return value
    elif hint is None or hint is type(None):
        if value is None:
            return None
    elif hint is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    elif hint is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif hint is list or origin is list:
        if isinstance(value, list):
            return [convert(item, arguments[0]) for item in value] if arguments else value
    elif hint is tuple or origin is tuple:
        if isinstance(value, list | tuple):
            if not arguments:
                return tuple(value)
            hints = arguments[:1] * len(value) if arguments[1:] == (...,) else arguments
            if len(hints) == len(value):
                return tuple(convert(item, item_hint) for item, item_hint in zip(value, hints, strict=True))
    elif hint is dict or origin is dict:
        if isinstance(value, dict):
            key, item = arguments or (Any, Any)
            return {convert(k, key): convert(v, item) for k, v in value.items()}
    elif isinstance(hint, type) and isinstance(value, hint):
        return value
    raise TypeError


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
