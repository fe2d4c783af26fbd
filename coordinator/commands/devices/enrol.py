"""`coordinator enrol`: a code by which one device may have its own key registered.

Not here: what is in a code (`edge_sdk/transport/enrol_code.py`) and who keeps it
(`coordinator/gateway/keys/enrolment_book.py`).
"""

from __future__ import annotations

import argparse
import io
import ipaddress
import json
import math
import socket
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from coordinator.commands.parser import add_command
from coordinator.commands.terminal import say
from coordinator.config.presets import load_serve_config
from coordinator.gateway.keys.enrolment_book import LASTS_S, EnrolmentBook
from edge_sdk.errors import ConfigError
from edge_sdk.transport.addresses import DEFAULT_PORT, check_dialled, parse_address
from edge_sdk.transport.enrol_code import write_code
from edge_sdk.transport.keys import fingerprint, load_key_pair

# A datagram to here would leave by the default route; none is sent. RFC 5737: it is nobody's.
_ELSEWHERE = ("192.0.2.1", 9)
DIAL_S = 1.0


class _Where(NamedTuple):
    """Files and address of the coordinator that a device enrols with."""

    secret_key: Path
    allow_list: Path
    address: str
    is_guessed: bool
    """Whether the host in the address was chosen here."""


def add_enrol(commands: Any) -> None:
    """Register the command with the parser of `coordinator`."""
    parser = add_command(commands, "enrol", "make a code by which a device may register", _enrol)
    parser.description = (
        "Prints a code that works once, for one device and a few minutes; on the device, "
        "`edge-sdk enrol CODE` makes its key, registers it and writes its config. The coordinator "
        "may be started later than the code is made; to use the code, it must serve."
    )
    add = parser.add_argument
    add("name", help="name of the device in this coordinator's runs")
    add("--config", type=Path, help="the run's: names key, allow-list and port")
    add("--address", help="tcp://HOST:PORT that devices dial; default: this machine's")
    add("--key", type=Path, help="the coordinator's secret key; default: coordinator.key")
    add("--allow-list", type=Path, help="default: devices.yaml")
    add(
        "--minutes",
        type=_minutes,
        default=LASTS_S / 60,
        metavar="N",
        help="how long the code may be used; default: %(default)g",
    )
    add("--replace", action="store_true", help="the name may be registered already")
    add("--withdraw", action="store_true", help="make the name's code void, and no new one")
    add("--format", choices=("text", "json"), default="text")
    add("--no-qr", action="store_true", help="draw no QR code")


def _minutes(text: str) -> float:
    minutes = float(text)
    if not math.isfinite(minutes):
        raise ValueError(text)
    return minutes


def _enrol(options: argparse.Namespace) -> int:
    if options.withdraw:
        book = EnrolmentBook(_files(options)[1])
        found = book.withdraw(options.name)
        say(f"the code of {options.name} is void" if found else f"{options.name} has no open code")
        return 0
    where = _where(options)
    public = load_key_pair(where.secret_key).public
    code = EnrolmentBook(where.allow_list).make_code(
        options.name,
        where.address,
        public,
        lasts_s=60 * options.minutes,
        replaces=options.replace,
    )
    text, until_s = write_code(code), time.time() + 60 * options.minutes
    if options.format == "json":
        row = {"name": options.name, "code": text, "address": code.address, "until": int(until_s)}
        say(json.dumps(row | {"server_key": public}, indent=2))
        return 0
    clock = time.strftime("%H:%M", time.localtime(until_s))
    say(f"On the device that is to be {options.name}, once and before {clock}:\n")
    say(f"edge-sdk enrol {text}\n")
    if not options.no_qr:
        _draw(text.replace("-", ""))
    say(f"address      {code.address}")
    if where.is_guessed:
        say("             (this machine's; --address names another)")
    elif _is_of_this_machine(code.address):
        say("             (reached from this machine alone; --address names another)")
    say(f"coordinator  {fingerprint(public)}")
    say(f"allow-list   {where.allow_list}")
    say("Whoever has the code can take the place of the device until it is used.")
    if not _is_served(code.address):
        say(f"Nobody listens at {code.address} yet: coordinator serve")
    return 0


def _files(options: argparse.Namespace) -> tuple[Path, Path, str]:
    """Return secret key, allow-list and listening address that the options mean."""
    key, allow_list, listen = Path("coordinator.key"), Path("devices.yaml"), ""
    if options.config is not None:
        config = load_serve_config(options.config)
        key, allow_list, listen = config.secret_key, config.allow_list, config.listen
    return options.key or key, options.allow_list or allow_list, listen


def _where(options: argparse.Namespace) -> _Where:
    key, allow_list, listen = _files(options)
    if options.address:
        try:
            check_dialled("--address", options.address)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        return _Where(key, allow_list, options.address, is_guessed=False)
    if not listen:
        return _Where(key, allow_list, f"tcp://{_own_host()}:{DEFAULT_PORT}", is_guessed=True)
    if parse_address(listen) is not None:
        return _Where(key, allow_list, listen, is_guessed=False)
    host, _, port = listen.removeprefix("tcp://").rpartition(":")
    if port == "*" or not port.isdigit() or port == "0":
        raise ConfigError(f"listen is {listen!r}, any port: --address tcp://HOST:PORT says which")
    host = _own_host() if host == "*" else host
    return _Where(key, allow_list, f"tcp://{host}:{port}", is_guessed=True)


def _own_host() -> str:
    """Return the address of this machine by which others most likely reach it.

    Raises:
        ConfigError: it has no way out.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(_ELSEWHERE)
            return str(sock.getsockname()[0])
        except OSError as error:
            raise ConfigError(
                f"no network here ({error.strerror}): --address tcp://HOST:{DEFAULT_PORT}"
            ) from error


def _is_of_this_machine(address: str) -> bool:
    where = parse_address(address)
    try:
        return where is not None and ipaddress.ip_address(where[0]).is_loopback
    except ValueError:
        return where is not None and where[0] == "localhost"


def _is_served(address: str) -> bool:
    where = parse_address(address)
    try:
        socket.create_connection(where or ("", 0), DIAL_S).close()
    except (OSError, UnicodeError):
        return False
    return True


def _draw(text: str) -> None:
    """Draw a QR code, where a person looks on and there is something to draw it with."""
    if not sys.stdout.isatty() or "utf" not in (sys.stdout.encoding or "").lower():
        return
    try:
        import segno
    except ImportError:
        say("(a QR code is drawn where segno is installed: pip install segno)\n")
        return
    drawn = io.StringIO()
    segno.make_qr(text, error="l").terminal(drawn, compact=True)
    for line in drawn.getvalue().splitlines():  # what is light is light on any terminal
        say(f"\x1b[97;40m{line}\x1b[0m")
    say("")
