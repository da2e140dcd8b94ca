"""Where settings come from: a TOML file, then the environment, then the command line.

The only module that reads the environment. Later wins; every key remembers who set it.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path

import msgspec

from serverlessllm.config import schema
from serverlessllm.config.paths import Paths, derive
from serverlessllm.config.settings import Settings

FILE_NAME = "serverlessllm.toml"
DEFAULT = "default"
COMMAND_LINE = "command line"
_NOT_SETTINGS = {"SLLM_CONFIG", "SLLM_URL", "SLLM_API_KEY", "SLLM_CA"}


class ConfigError(Exception):
    """The settings are wrong: the message says where, which key, and what was expected."""


class Loaded(msgspec.Struct, frozen=True, kw_only=True):
    """The settings in force, and who set each key."""

    settings: Settings
    paths: Paths
    origins: dict[str, str]
    """Key → file, variable, or `command line`; a key that is missing has its default."""
    path: Path | None
    """The file that was read."""
    environ: Mapping[str, str]
    """The process's own; backends inherit a chosen part of it."""

    @property
    def store_url(self) -> str:
        """Of the checkpoint store."""
        return self.settings.store_url or self.paths.store_dir.as_uri()

    @property
    def metadata_url(self) -> str:
        """Of the metadata store."""
        return self.settings.metadata_url or f"sqlite://{self.paths.metadata_file}"

    @property
    def has_metadata(self) -> bool:
        """Whether that may hold something: the embedded one is made on first use."""
        return self.settings.metadata_url is not None or self.paths.metadata_file.exists()


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One line of `sllm config check`."""

    key: str
    value: str
    origin: str


def load(
    *,
    path: Path | None = None,
    overrides: Mapping[str, object] | None = None,
    environ: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> Loaded:
    """Merge all sources over the defaults.

    `path` is `--config`; without it `SLLM_CONFIG`, `./serverlessllm.toml` and the XDG
    configuration directory are tried in turn. `overrides` are dotted keys of the command line.

    Raises:
        ConfigError: a file that cannot be read, a key nobody knows, a value of the wrong kind.
    """
    environ = os.environ if environ is None else environ
    known = schema.fields(Settings)
    path = _find_file(path, environ, cwd or Path.cwd())
    values: dict[str, object] = {}
    origins: dict[str, str] = {}
    layers: list[tuple[str, dict[str, object]]] = [
        *([(str(path), _read_file(path, known))] if path else []),
        *_read_environment(environ, known),
        (COMMAND_LINE, {k: v for k, v in (overrides or {}).items() if v is not None}),
    ]
    for origin, layer in layers:
        for key, value in layer.items():
            field = known.get(key) or _refuse(key, origin, known)
            values[key] = _convert(field, value, origin)
            origins[key] = origin
    settings = _build(values, origins)
    return Loaded(
        settings=settings,
        paths=derive(settings, environ),
        origins=origins,
        path=path,
        environ=environ,
    )


def client_url(environ: Mapping[str, str] | None = None) -> str | None:
    """Where `SLLM_URL` says the orchestrator is."""
    return (os.environ if environ is None else environ).get("SLLM_URL") or None


def client_api_key(environ: Mapping[str, str] | None = None) -> str | None:
    """The key that `SLLM_API_KEY` gives to client verbs."""
    return (os.environ if environ is None else environ).get("SLLM_API_KEY") or None


def client_ca(environ: Mapping[str, str] | None = None) -> str | None:
    """The file of certificates that `SLLM_CA` has client verbs trust for https."""
    return (os.environ if environ is None else environ).get("SLLM_CA") or None


def effective(loaded: Loaded) -> tuple[Row, ...]:
    """Every setting with its value and origin; secrets hidden."""
    return tuple(
        Row(
            key=key,
            value=schema.HIDDEN if field.secret else show(lookup(loaded.settings, key)),
            origin=loaded.origins.get(key, DEFAULT),
        )
        for key, field in schema.fields(Settings).items()
    )


def lookup(settings: msgspec.Struct, key: str) -> object:
    """The value of a dotted key."""
    value: object = settings
    for part in key.split("."):
        value = getattr(value, part)
    return value


def show(value: object) -> str:
    """A value as the file would spell it, without the secrets that a URL or a table carries."""
    if value is None:
        return schema.AUTO
    if isinstance(value, str):
        scheme, separator, rest = value.partition("://")
        host, slash, path = rest.partition("/")
        return scheme + separator + host.rpartition("@")[2] + slash + path
    if isinstance(value, Mapping):
        value = {k: schema.HIDDEN if schema.is_secret(str(k)) else v for k, v in value.items()}
    return msgspec.json.encode(value, enc_hook=str).decode()


def _find_file(path: Path | None, environ: Mapping[str, str], cwd: Path) -> Path | None:
    if path is None and environ.get("SLLM_CONFIG"):
        path = Path(environ["SLLM_CONFIG"])
    if path is not None:
        if not path.is_file():
            raise ConfigError(f"{path}: no such configuration file")
        return path
    home = environ.get("XDG_CONFIG_HOME") or str(Path(environ.get("HOME", "/")) / ".config")
    for candidate in (cwd / FILE_NAME, Path(home) / "serverlessllm" / FILE_NAME):
        if candidate.is_file():
            return candidate
    return None


def _read_file(path: Path, known: Mapping[str, schema.Field]) -> dict[str, object]:
    try:
        return _flatten(tomllib.loads(path.read_text(encoding="utf-8")), known)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text: {error.reason}") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error


def _flatten(
    table: Mapping[str, object], known: Mapping[str, schema.Field], prefix: str = ""
) -> dict[str, object]:
    """Nested tables → dotted keys, down to the keys that are settings of their own."""
    flat: dict[str, object] = {}
    for name, value in table.items():
        key = prefix + name
        if not isinstance(value, Mapping) or key in known:
            flat[key] = value
        elif value:
            flat |= _flatten(value, known, key + ".")
        elif not any(other.startswith(key + ".") for other in known):
            flat[key] = value  # an empty table that is no section either: to be refused
    return flat


def _read_environment(
    environ: Mapping[str, str], known: Mapping[str, schema.Field]
) -> list[tuple[str, dict[str, object]]]:
    """Each variable that is meant for us, as a layer of its own: its name is the origin.

    A name that is not ours is only refused where it must be a mistake (it has a section, or is
    nearly one of ours): container platforms put `SLLM_SERVICE_HOST` and the like there.
    """
    by_name = {field.environment: key for key, field in known.items()}
    found: list[tuple[str, dict[str, object]]] = []
    for name, text in sorted(environ.items()):
        if not name.startswith("SLLM_") or name in _NOT_SETTINGS:
            continue
        if name in by_name:
            found.append((name, {by_name[name]: text}))
            continue
        near = difflib.get_close_matches(name, by_name, n=1, cutoff=0.75)
        if near or "__" in name:
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"environment: {name} is not a setting{hint}")
    return found


def _refuse(key: str, origin: str, known: Mapping[str, schema.Field]) -> schema.Field:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if not near:
        by_name = {known_key.rpartition(".")[2]: known_key for known_key in known}
        names = difflib.get_close_matches(key.rpartition(".")[2], by_name, n=1, cutoff=0.6)
        near = [by_name[name] for name in names]
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"{origin}: {key!r} is not a setting{hint}")


def _convert(field: schema.Field, value: object, origin: str) -> object:
    try:
        return field.convert(value)
    except (ValueError, msgspec.MsgspecError) as error:
        shown = schema.HIDDEN if field.secret else repr(value)
        raise ConfigError(
            f"{origin}: {field.key}: expected {field.expected}, got {shown}"
        ) from error


def _build(values: Mapping[str, object], origins: Mapping[str, str]) -> Settings:
    tree: dict[str, dict[str, object]] = {name: {} for name in schema.sections(Settings)}
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        tree[section][name] = value
    # Deepest first, so that a section finds those inside it built.
    for name, kind in sorted(schema.sections(Settings).items(), key=lambda i: -i[0].count(".")):
        if not name:
            continue
        parent, _, last = name.rpartition(".")
        tree[parent][last] = _construct(kind, name, tree[name], origins)
    root = _construct(Settings, "", tree[""], origins)
    assert isinstance(root, Settings)
    return root


def _construct(
    kind: type[msgspec.Struct], section: str, values: dict[str, object], origins: Mapping[str, str]
) -> msgspec.Struct:
    """Build one section; what its own checks refuse is told with where the values came from."""
    try:
        return kind(**values)
    except (ValueError, TypeError) as error:
        set_by = sorted({o for key, o in origins.items() if key.rpartition(".")[0] == section})
        where = ", ".join(set_by) or DEFAULT
        raise ConfigError(f"{where}: [{section or 'top level'}]: {error}") from error
