"""Enrol this device by a code: make its key, have it registered, write its config.

Nothing is written before the code has been read; the config is, when the coordinator has agreed.
Not here: the code (`transport/enrol_code.py`) and what is said to the coordinator
(`transport/enrol.py`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from edge_sdk.client import config as client_config
from edge_sdk.client.config import ClientConfig
from edge_sdk.config.loader import load_config
from edge_sdk.config.templates import filled, write_config
from edge_sdk.errors import ConfigError, RefusedError
from edge_sdk.files import atomic_write, make_folder, storage_errors
from edge_sdk.transport.enrol import ANSWER_S, redeem
from edge_sdk.transport.enrol_code import EnrolCode, read_code
from edge_sdk.transport.handshake import shake_hands
from edge_sdk.transport.keys import KeyPair, create_key_pair, load_key_pair
from edge_sdk.transport.link import LinkConfig

TEMPLATE = Path(client_config.__file__).with_name("device.yaml")
EXAMPLE = "examples/device.yaml"
"""What the template calls the file that it becomes."""
_KEY = "device.key"


@dataclass(frozen=True, slots=True, kw_only=True)
class Enrolment:
    """What has come of an enrolment code."""

    name: str
    """The device's name in the coordinator's runs."""
    address: str
    server_key: str
    key: Path
    """This device's secret key."""
    public_key: str
    is_new_key: bool
    config: Path
    changed: tuple[str, ...]
    """Settings of a config that was there which are others now; all of a new one are new."""
    is_new_config: bool


def template_text(path: Path, values: Mapping[str, str | None]) -> str:
    """Return the commented config of a device that is to be at *path*, with *values* in it.

    Raises:
        ConfigError: a value is none that a device could have.
    """
    # What is wrong with a value is better known before there is a file.
    load_config(ClientConfig, TEMPLATE, [f"{k}={v}" for k, v in values.items() if v], env={})
    return filled(TEMPLATE.read_text(encoding="utf-8"), values).replace(EXAMPLE, str(path))


def enrol(
    text: str,
    config: Path,
    key: Path | None = None,
    address: str | None = None,
    wait_s: float = 0.0,
    tell: Callable[[str], object] = lambda _: None,
) -> Enrolment:
    """Redeem the enrolment code *text*, and leave behind what `edge-sdk run` needs.

    Args:
        text: The code as `coordinator enrol` has printed it.
        config: The device's config; one that is there keeps all but the coordinator and its key.
        key: Its secret key, made unless it is there; None: that of the config, or `device.key`
            beside it.
        address: Where this device finds the coordinator, if not at the code's address: behind a
            tunnel, for instance. Its key is that in the code all the same.
        wait_s: Seconds for which a coordinator is waited for that does not listen yet.
        tell: Is told, in a line, that it is waited for.

    Raises:
        ConfigError: the code is none or mistyped, the config or the key that is there is no good.
        RefusedError: the coordinator does not take the code; it says why.
        PeerGone: no coordinator with the code's key answers.
        StorageError: the key or the config cannot be written.
    """
    code = read_code(text)
    if address is not None:
        code = _elsewhere(code, address)
    before = _text_of(config)
    secret = _secret_path(before, config, key)
    after = _text_for(config, before, code, secret if key or before is None else None)
    with storage_errors(config):
        make_folder(config.parent)
    is_new_key = not secret.exists()
    pair = create_key_pair(secret) if is_new_key else load_key_pair(secret)
    name = redeem(code, pair.public, wait_s=wait_s, tell=tell)
    _see_that_it_is_let_in(code, pair)
    _write(config, before, _named(after, name) if before is None else after)
    return Enrolment(
        name=name,
        address=code.address,
        server_key=code.server_key,
        key=secret,
        public_key=pair.public,
        is_new_key=is_new_key,
        config=config,
        changed=() if before is None else _changed(before, after),
        is_new_config=before is None,
    )


def _text_of(config: Path) -> str | None:
    try:
        return config.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "not UTF-8"
        raise ConfigError(f"cannot read {config}: {why}") from error


def _text_for(config: Path, before: str | None, code: EnrolCode, secret: Path | None) -> str:
    """Return what the config is to be; *secret* is named in it unless it is None."""
    values = {"coordinator": code.address, "server_key": code.server_key}
    if secret is not None:
        values["secret_key"] = _from(config, secret)
    return template_text(config, values) if before is None else _merged(before, values, config)


def _write(config: Path, before: str | None, after: str) -> None:
    if before is None:
        write_config(config, after)
    elif after != before:
        # A link stays one.
        atomic_write(config.resolve(), after, mode=config.stat().st_mode & 0o777)


def _elsewhere(code: EnrolCode, address: str) -> EnrolCode:
    try:
        return replace(code, address=address)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _named(text: str, name: str) -> str:
    """Return a new config that tells its reader the device's name; no setting does."""
    return re.sub(r"(?m)^(coordinator: \S+)$", rf"\1   # where this device is {name}", text)


def _see_that_it_is_let_in(code: EnrolCode, pair: KeyPair) -> None:
    """Shake hands with the registered key, so that `edge-sdk run` will be let in.

    Raises:
        RefusedError: it is not.
    """
    config = LinkConfig(address=code.address, server_key=code.server_key, keys=pair)
    if shake_hands(config, ANSWER_S).refused is not None:
        raise RefusedError(
            "the coordinator has registered this device's key and refuses it: somebody has taken "
            "it off the list again, or the allow-list cannot be read there"
        )


def _secret_path(text: str | None, config: Path, key: Path | None) -> Path:
    if key is not None:
        return key
    named = None if text is None else _settings(text, config).get("secret_key")
    return config.parent / (str(named) if named else _KEY)


def _from(config: Path, path: Path) -> str:
    """Return *path* as the config names it, which counts from its own folder."""
    try:
        return str(path.resolve().relative_to(config.parent.resolve()))
    except ValueError:
        return str(path.resolve())


def _settings(text: str, config: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = "" if where is None else f", line {where.line + 1}"
        raise ConfigError(f"{config}{line}: not YAML") from error
    if found is not None and not isinstance(found, dict):
        raise ConfigError(f"{config}: not a list of settings")
    return found or {}


def _merged(text: str, values: Mapping[str, str], config: Path) -> str:
    """Return *text* with *values* in it, everything else as it was.

    Raises:
        ConfigError: it is written so that this is not certain.
    """
    wanted = {**_settings(text, config), **values}
    for key, value in values.items():
        word = yaml.safe_dump(value, default_flow_style=True, width=10_000).splitlines()[0]
        line = rf"(?m)^{key}:[ \t]*(?:'[^'\n]*'|\"[^\"\n]*\"|[^\s#'\"][^\s]*)?(?=[ \t]*(?:#.*)?$)"
        text, times = re.subn(line, f"{key}: {word}".replace("\\", r"\\"), text)
        if not times:
            text = f"{text.rstrip()}\n{key}: {word}\n" if text.strip() else f"{key}: {word}\n"
    try:
        is_sure = yaml.safe_load(text) == wanted
    except yaml.YAMLError:
        is_sure = False
    if not is_sure:
        lines = "; ".join(f"{key}: {value!r}" for key, value in values.items())
        raise ConfigError(f"{config} is written so that only you can change it; set {lines}")
    return text


def _changed(before: str, after: str) -> tuple[str, ...]:
    old, new = yaml.safe_load(before) or {}, yaml.safe_load(after)
    return tuple(key for key in new if old.get(key) != new[key])
