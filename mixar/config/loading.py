"""From defaults, a yaml file and `key=value` to a checked config, and back to plain values."""

import dataclasses
import typing
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mixar.config.checks import get, validate
from mixar.config.knobs import Config
from mixar.errors import UserError, did_you_mean
from mixar.resources import find_config

Section = TypeVar("Section")


def load_config(path: str | Path | None, overrides: list[str] | None = None) -> Config:
    """Defaults < the yaml file at `path` < `key=value` overrides, checked.

    Raises:
        UserError: a file that is missing or no yaml, an unknown key, a wrong type, an impossible combination.
    """
    merged = OmegaConf.structured(Config)
    layers = [(_read_yaml(path), str(path))] if path is not None else []
    layers += [(_read_override(text), text) for text in overrides or []]
    for layer, source in layers:
        _check_keys(layer, Config, source)
        try:
            merged = OmegaConf.merge(merged, layer)
        except OmegaConfBaseException as error:
            raise UserError(_type_message(error, source)) from None
    config = _to_object(merged)
    validate(config)
    return config


def section_from_dict(section: type[Section], values: dict[str, Any], source: str) -> Section:
    """The dataclass `section` from plain values, such as an export's config.json, all of them given.

    Raises:
        UserError: an unknown key or a wrong type.
    """
    _check_keys(values, section, source)
    try:
        return typing.cast(Section, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(section), values)))
    except OmegaConfBaseException as error:
        raise UserError(_type_message(error, source)) from None


def to_dict(config: Any) -> dict[str, Any]:
    """A config, or a section of one, as plain nested values."""
    return dataclasses.asdict(config)


def to_yaml(config: Config) -> str:
    """The whole resolved config as yaml."""
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))


def _read_yaml(path: str | Path) -> dict[str, Any]:
    file = find_config(path)
    try:
        loaded = OmegaConf.load(file)
    except Exception as error:  # yaml's own family of errors, which only omegaconf's dependency names
        raise UserError(f"{file} is no valid yaml: {' '.join(str(error).split())}") from None
    values = OmegaConf.to_container(loaded)
    if not isinstance(values, dict):
        raise UserError(f"{file} must hold `key: value` lines, not a list")
    return typing.cast(dict[str, Any], values)


def _read_override(text: str) -> dict[str, Any]:
    key, equals, _ = text.partition("=")
    if not equals or not key:
        raise UserError(f"'{text}' is no override: write key=value, such as train.batch=256")
    try:
        return typing.cast(dict[str, Any], OmegaConf.to_container(OmegaConf.from_dotlist([text])))
    except Exception as error:
        raise UserError(f"'{text}' cannot be read: {' '.join(str(error).split())}") from None


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
        if dataclasses.is_dataclass(fields[key]):
            if not isinstance(value, dict):
                inner = next(iter(typing.get_type_hints(fields[key])))
                raise UserError(f"{source}: '{prefix}{key}' is a section, write {prefix}{key}.{inner}=...")
            _check_keys(value, typing.cast(type, fields[key]), source, f"{prefix}{key}.")


def _type_message(error: OmegaConfBaseException, source: str) -> str:
    key = (getattr(error, "full_key", None) or "?").split("[")[0]
    reason = str(error).split("\n")[0].rstrip(".") + "."
    try:
        expected = typing.get_type_hints(type(get(Config(), key.rpartition(".")[0]) if "." in key else Config()))
        wanted = expected[key.rpartition(".")[2]]
        reason += f" Write {key}=<{wanted.__name__ if isinstance(wanted, type) else wanted}>."
    except (AttributeError, KeyError):
        pass  # the key could not be placed; omegaconf's own reason stands alone
    return f"{source}: {key}: {reason}"


def _to_object(merged: Any) -> Config:
    try:
        return typing.cast(Config, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        raise UserError(_type_message(error, "config")) from None
