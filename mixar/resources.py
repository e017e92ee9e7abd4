"""Files that ship with the code: configs, which have names, and the operators' sources."""

from pathlib import Path

from mixar.errors import UserError, did_you_mean


def _folder(name: str) -> Path:
    """The folder `name` inside an installed package, or at the top of a clone."""
    package = Path(__file__).resolve().parent
    return next((path for path in (package / name, package.parent / name) if path.is_dir()), package / name)


CONFIGS = _folder("configs")
SOURCES = _folder("csrc")


def config_names() -> list[str]:
    """The names of the configs that ship with mixar: mixar_l, demo/mixar, ..."""
    files = [path.relative_to(CONFIGS).with_suffix("").as_posix() for path in CONFIGS.rglob("*.yaml")]
    return sorted(files, key=lambda name: ("/" in name, name))


def find_config(given: str | Path) -> Path:
    """The file `given`, or the config of that name.

    Raises:
        UserError: neither exists.
    """
    file, names = Path(given), config_names()
    if file.is_file():
        return file
    if str(given) in names:
        return CONFIGS / f"{given}.yaml"
    if file.is_dir():
        raise UserError(f"{file} is a folder: name a yaml file, such as {file / 'config.yaml'}")
    beside = sorted(str(path) for path in file.parent.glob("*.yaml"))
    hint = did_you_mean(str(given), [*beside, *names]) or did_you_mean(file.stem, names)
    raise UserError(f"no config file at {given}, and none of that name.{hint} Names: {', '.join(names)}")
