"""`coordinator client` and `coordinator keygen`: who may take part, and with which keys."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from coordinator.commands.parser import add_command
from coordinator.commands.terminal import say
from coordinator.gateway.keys.allow_list import AllowList
from coordinator.gateway.keys.enrolment_book import EnrolmentBook
from coordinator.gateway.keys.refused_keys import RefusedKey, read_refused, refused_path
from edge_sdk.errors import ConfigError
from edge_sdk.transport.keys import create_key_pair, fingerprint, load_public_key


def add_keygen(commands: Any) -> None:
    """Register the command with the parser of `coordinator`."""
    keygen = add_command(commands, "keygen", "make the coordinator's key pair", _keygen)
    keygen.add_argument("path", nargs="?", default="coordinator.key", help="default: %(default)s")


def add_client(commands: Any) -> None:
    """Register the command with the parser of `coordinator`."""
    parser = commands.add_parser("client", help="who may take part")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    register = add_command(verbs, "register", "allow a device", _register)
    register.add_argument("name", help="name of the device in this coordinator's runs")
    register.add_argument("key", help="its public key, or the file that holds it")
    unregister = add_command(verbs, "unregister", "no longer allow a device", _unregister)
    unregister.add_argument("name")
    listing = add_command(verbs, "list", "list the allowed devices", _list, formats=True)
    pending = add_command(
        verbs, "pending", "keys that were refused, and codes that are open", _pending, formats=True
    )
    approve = add_command(verbs, "approve", "allow a device whose key was refused", _approve)
    approve.add_argument("name", help="name that the device gets in this coordinator's runs")
    approve.add_argument("key", help="the refused key, or its fingerprint as the device shows it")
    approve.add_argument("--replace", action="store_true", help="the name may be registered")
    for verb in (register, unregister, listing, pending, approve):
        verb.add_argument(
            "--allow-list", type=Path, default=Path("devices.yaml"), help="default: %(default)s"
        )


def _keygen(options: argparse.Namespace) -> int:
    pair = create_key_pair(options.path)
    print(f"secret key: {options.path} (mode 0600)")
    print(f"public key: {pair.public}  fingerprint {fingerprint(pair.public)}")
    return 0


def _register(options: argparse.Namespace) -> int:
    AllowList(options.allow_list).register(options.name, load_public_key(options.key))
    print(f"{options.name} may take part")
    return 0


def _unregister(options: argparse.Namespace) -> int:
    AllowList(options.allow_list).unregister(options.name)
    print(f"{options.name} may no longer take part")
    return 0


def _list(options: argparse.Namespace) -> int:
    devices = AllowList(options.allow_list).devices()
    if options.format == "json":
        print(json.dumps(devices, indent=2))
        return 0
    for name, key in sorted(devices.items()):
        print(f"{name:<20} {fingerprint(key)}")
    return 0


def _refused(allow_list: Path) -> list[RefusedKey]:
    """Return the keys that were refused and are not registered by now, the latest last."""
    known = set(AllowList(allow_list).devices().values())
    return [one for one in read_refused(refused_path(allow_list)) if one.key not in known]


def _pending(options: argparse.Namespace) -> int:
    refused = _refused(options.allow_list)
    codes = EnrolmentBook(options.allow_list).open_codes()
    if options.format == "json":
        keys = [{**asdict(one), "fingerprint": fingerprint(one.key)} for one in refused]
        waiting = [{"name": code.name, "until_s": code.until_s} for code in codes]
        say(json.dumps({"refused": keys, "codes": waiting}, indent=2))
        return 0
    for one in refused:
        times = "once" if one.times == 1 else f"{one.times} times"
        say(f"{fingerprint(one.key)}  {times} from {one.source}")
        say(f"    first {_clock(one.first_s)}, last {_clock(one.last_s)}")
        say(f"    key {one.key}")
    for code in codes:
        say(f"{code.name}: a code is open until {_clock(code.until_s)}")
    if refused:
        say("One that you know: coordinator client approve NAME FINGERPRINT")
    elif not codes:
        say("no key was refused, and no code is open")
    return 0


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _approve(options: argparse.Namespace) -> int:
    wanted, allow_list = options.key, options.allow_list
    found = {one.key for one in _refused(allow_list) if wanted in (one.key, fingerprint(one.key))}
    if not found:
        raise ConfigError(
            f"no key {wanted!r} was refused lately (whole keys and whole fingerprints count); see "
            "`coordinator client pending`, or: coordinator client register NAME KEY"
        )
    if len(found) > 1:  # somebody has searched for a key with another one's fingerprint
        raise ConfigError(f"{len(found)} keys have the fingerprint {wanted}; name the whole key")
    key = found.pop()
    AllowList(allow_list).register(options.name, key, replaces=options.replace)
    say(f"{options.name} may take part, with the key {fingerprint(key)}")
    return 0
