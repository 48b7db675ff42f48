"""Recipes from files and options, refused by the key where they are wrong."""

from __future__ import annotations

import re
import tomllib
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from pyro_vae import __version__
from pyro_vae.recipe.recipe import Part, Recipe, Source, tuples, unknown


def read_recipe(path: str | Path) -> Recipe:
    """A recipe from a YAML or TOML file.

    Raises:
        ValueError: no such file, another format, an unknown key, with the nearest known.
    """
    import yaml

    path = Path(path)
    try:
        text = path.read_text()
        found = tomllib.loads(text) if path.suffix == ".toml" else yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise ValueError(f"{str(path)!r} cannot be read: {reason}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{str(path)!r} holds no configuration")
    version = str(found.pop("version", __version__))
    if _numbers(version) > _numbers(__version__):
        raise ValueError(
            f"{str(path)!r} is of pyro_vae {version}, this is {__version__}"
            "\n  try:      pip install --upgrade pyro-vae"
        )
    return _from_plain(Recipe, found, str(path))


def recipe_of(options: Any) -> Recipe:
    """A recipe from parsed options of the same names."""
    plain = {f.name: getattr(options, f.name) for f in fields(Recipe)}
    plain = {k: v.as_dict() if hasattr(v, "as_dict") else v for k, v in plain.items()}
    return _from_plain(Recipe, plain, "options")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def _from_plain(kind: Any, found: Any, where: str) -> Any:
    """A dataclass from nested mappings."""
    if isinstance(found, str) and kind in (Part, Source):
        found = {"name": found}
    if not isinstance(found, dict):
        raise ValueError(f"{where}: expected keys, got {found!r}")
    kinds = {f.name: f for f in fields(kind)}
    hints = get_type_hints(kind)
    values: dict[str, Any] = {}
    for key, value in found.items():
        if key not in kinds:
            raise ValueError(f"{where}: {unknown('key', key, kinds)}")
        nested = is_dataclass(hints[key])
        if not nested and not _fits(value, hints[key]):
            raise ValueError(
                f"{where}: {key} is of another kind\n  expected: {_named(hints[key])}"
                f"\n  got:      {value!r}"
            )
        values[key] = _from_plain(hints[key], value, f"{where}, {key}") if nested else value
    for name, own in kinds.items():
        if name not in values and own.default is MISSING and own.default_factory is MISSING:
            raise ValueError(f"{where}: {name} is missing")
    return kind(**tuples(values))


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value read from a file is of a type: numbers, text, lists and mappings."""
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(value, one) for one in get_args(hint))
    if get_origin(hint) is tuple:
        sizes = get_args(hint)
        counted = sizes[-1] is Ellipsis or len(sizes) == len(value) if _is_list(value) else False
        return counted and all(_fits(item, sizes[0]) for item in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, get_origin(hint) or hint)


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _named(hint: Any) -> str:
    return str(getattr(hint, "__name__", hint)).replace("NoneType", "null")
