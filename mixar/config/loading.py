"""Loading of a config from defaults, a yaml file, its bases and `key=value`, and conversion to plain values."""

import dataclasses
import os
import re
import sys
import typing
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mixar.config.checks import get, validate
from mixar.config.knobs import Config, stride
from mixar.config.old import MISSING, upgrade
from mixar.errors import UserError, did_you_mean
from mixar.resources import config_names, find_config

Section = TypeVar("Section")


def load_config(path: str | Path | None, overrides: list[str] | None = None) -> Config:
    """The checked config of defaults < the bases of the yaml file at `path` < the file < `key=value` overrides.

    A line `base: other.yaml` in a file includes the values of that file, given by its path from the file's own folder
    or by the name of a config that ships with mixar. A base may have a base itself.

    `trust_pickle` applies to a single command, so it is ignored except in an override.

    Raises:
        UserError: a file is missing or is not yaml, bases form a circle, a key is unknown, a type is wrong, or a
            combination is impossible.
    """
    merged = _defaults()
    layers = [] if path is None else [(values, str(file)) for file, values in _read_files(path).items()]
    trusting = any([values.pop("trust_pickle", False) for values, _ in layers])
    layers += [(_read_override(text), text) for text in overrides or []]
    for layer, source in layers:
        upgrade(layer, merged.data.image_size, list(merged.vae.multipliers))
        _check_keys(layer, Config, source)
        try:
            merged = OmegaConf.merge(merged, layer)
        except (OmegaConfBaseException, OverflowError) as error:
            raise UserError(_type_message(error, source)) from None
    config = _to_object(merged)
    validate(config)
    if trusting and not config.trust_pickle:
        print(f"{path}: trust_pickle is ignored in a file: pass --trust-pickle if you trust the weights",
              file=sys.stderr)  # fmt: skip
    return config


def value_of(config: Config, key: str) -> Any:
    """The value at a dotted key.

    Raises:
        UserError: there is no such key, or it is a section.
    """
    _check_keys(_nested(key, None), Config, key)
    return get(config, key)


def section_from_dict(section: type[Section], values: dict[str, Any], source: str) -> Section:
    """The dataclass `section` from the complete plain values of, for example, an export's config.json.

    Raises:
        UserError: a key is unknown or a type is wrong.
    """
    name = next((name for name, kind in typing.get_type_hints(Config).items() if kind is section), "")
    sections = {name: MISSING.get(name, {}) | values}
    upgrade(sections)
    values = sections[name]
    _check_keys(values, section, source)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(section), _literal(values))
        return typing.cast(Section, OmegaConf.to_object(merged))
    except (OmegaConfBaseException, OverflowError) as error:
        raise UserError(_type_message(error, source)) from None


def to_dict(config: Any) -> dict[str, Any]:
    """A config, or a section of one, as plain nested values."""
    return dataclasses.asdict(config)


def to_yaml(config: Config) -> str:
    """The complete resolved config as yaml, for `load_config`, without `trust_pickle`."""
    return OmegaConf.to_yaml(OmegaConf.create(_literal(to_dict(config) | {"trust_pickle": False})))


@cache
def _defaults() -> Any:
    return OmegaConf.structured(Config)  # the slowest part of loading


def config_files(path: str | Path) -> list[Path]:
    """The files of a config: its bases, the lowest first, and itself. Raises UserError as `load_config`."""
    return list(_read_files(path))


def _read_files(path: str | Path) -> dict[Path, dict[str, Any]]:
    """The values in each of `config_files`."""
    found: dict[Path, dict[str, Any]] = {}
    try:
        file = find_config(path)
        while True:
            values = found[file] = _read_yaml(file)
            if "base" not in values:
                return dict(reversed(found.items()))
            file = _find_base(values.pop("base"), file, [*found])
    except OSError as error:
        raise UserError(f"{error.filename or path} cannot be read ({error.strerror}): name a yaml file") from None


def _find_base(base: Any, file: Path, found: list[Path]) -> Path:
    """The file named by the line `base: {base}` of `file`, after `found` have been read."""
    if not isinstance(base, str) or not base or not base.isprintable():
        raise UserError(f"{file} has base: {base}, which is not a path: write the path of a yaml file, or no base")
    beside = Path(os.path.normpath(file.parent / base))
    there = find_config(base) if base in config_names() and not beside.exists() else beside
    if there.resolve() in [path.resolve() for path in found]:
        circle = " -> ".join(map(str, [*found, there]))
        raise UserError(f"base: {base} in {file} makes a circle, {circle}: remove the line from one of them")
    if not there.is_file():
        hint = did_you_mean(base, [path.name for path in file.parent.glob("*.yaml") if path not in found])
        raise UserError(
            f"base: {base} in {file} names {there}, which does not exist: write its path from {file.parent}, or the "
            f"name of a config, such as base: mixar_l.{hint}"
        )
    return there


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{file} is not text in UTF-8: name a yaml file, or save it in UTF-8") from None
    try:
        values = OmegaConf.to_container(OmegaConf.create(text))
    except Exception as error:  # of yaml or omegaconf, which may raise anything
        raise UserError(f"{file} is not valid yaml: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{file} must hold `key: value` lines, not a list")
    typed = typing.cast(dict[str, Any], values)
    _restore_strings(typed, yaml.load(text, yaml.BaseLoader), Config)
    return typed


def _read_override(text: str) -> dict[str, Any]:
    """The nested values of an override; a string is taken as typed, other types are read as yaml."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"'{text}' is not an override: write key=value, such as train.batch=256")
    if not value:
        raise UserError(f"'{text}' gives no value: write {key}=<value>, or leave {key} out")
    kind = _type_at(key)
    if kind == str | None and value in ("null", "None"):
        return _nested(key, None)
    if kind in (str, str | None):
        return _nested(key, _literal(value))
    try:
        read: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]))
    except Exception as error:
        raise UserError(f"'{text}' cannot be read: {' '.join(str(error).split())}") from None
    values = _nested(key, read["value"])
    _restore_strings(values, _nested(key, yaml.load(value, yaml.BaseLoader)), Config)
    return values


def _restore_strings(values: dict[str, Any], texts: Any, schema: type) -> None:
    """Replace strings by their text in the file, since yaml converts 007 to a number and on to true."""
    for key, kind in typing.get_type_hints(schema).items():
        value = values.get(key)
        if dataclasses.is_dataclass(kind) and isinstance(value, dict):
            _restore_strings(value, texts.get(key, {}), typing.cast(type, kind))
        elif kind in (str, str | None) and isinstance(value, (bool, int, float)):
            values[key] = texts.get(key, value)  # the text of a merge key (<<) is elsewhere


def _nested(key: str, value: Any) -> dict[str, Any]:
    """`value` at a dotted key."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return typing.cast(dict[str, Any], value)


def _type_at(key: str) -> Any:
    """The type of a dotted key, None if it is unknown."""
    kind: Any = Config
    for part in key.split("."):
        kind = typing.get_type_hints(kind).get(part) if dataclasses.is_dataclass(kind) else None
    return kind


def _literal(value: Any) -> Any:
    """`value` with its strings escaped, so that omegaconf takes `${` in them literally."""
    if isinstance(value, dict):
        return {key: _literal(inner) for key, inner in value.items()}
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def _check_keys(values: dict[str, Any], schema: type, source: str, prefix: str = "") -> None:
    fields = typing.get_type_hints(schema)
    for key, value in values.items():
        if key not in fields:
            homes = [
                f"'{section}.{key}'"
                for section, kind in typing.get_type_hints(Config).items()
                if dataclasses.is_dataclass(kind) and key in typing.get_type_hints(kind)
            ]
            similar = did_you_mean(str(key), fields).replace("'", f"'{prefix}", 1)
            hint = f" Did you mean {' or '.join(homes)}?" if homes else similar
            raise UserError(f"{source}: unknown key '{prefix}{key}'.{hint or ' Known: ' + ', '.join(fields)}")
        if value == "???":
            raise UserError(f"{source}: '{prefix}{key}' is ???, which means no value: write {prefix}{key}=<value>")
        if dataclasses.is_dataclass(fields[key]):
            if not isinstance(value, dict):
                inner = next(iter(typing.get_type_hints(fields[key])))
                raise UserError(f"{source}: '{prefix}{key}' is a section, write {prefix}{key}.{inner}=...")
            _check_keys(value, typing.cast(type, fields[key]), source, f"{prefix}{key}.")


def _type_message(error: Exception, source: str) -> str:
    key = (getattr(error, "full_key", None) or "?").split("[")[0]
    reason = str(error).split("\n")[0].rstrip(".") + "."
    try:
        expected = typing.get_type_hints(type(get(Config(), key.rpartition(".")[0]) if "." in key else Config()))
        wanted = expected[key.rpartition(".")[2]]
        reason += f" Write {key}=<{wanted.__name__ if isinstance(wanted, type) else wanted}>."
    except (AttributeError, KeyError):
        pass  # the key's type was not found, so omegaconf's own reason is used alone
    return f"{source}: {key}: {reason}"


def _to_object(merged: Any) -> Config:
    try:
        if OmegaConf.is_missing(merged.model, "grid"):  # it depends on three values: no interpolation can
            cells = merged.data.image_size // stride(merged.vae.multipliers)
            merged = OmegaConf.merge(merged, {"model": {"grid": max(1, cells // max(1, merged.model.patch))}})
        return typing.cast(Config, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        raise UserError(_type_message(error, "config")) from None
