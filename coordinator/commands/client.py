"""`coordinator client` and `coordinator keygen`: who may take part, and with which keys."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from coordinator.commands.parser import add_command
from coordinator.gateway.allow_list import AllowList
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
    for verb in (register, unregister, listing):
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
