"""CURVE keys: make, keep, read and show them.

A key pair is two files: `NAME` holds the secret key and is readable by its owner only, `NAME.pub`
holds the public key and may be given to anyone. Each is one line of Z85 (40 characters).
Not here: which keys the coordinator lets in (its `coordinator/gateway/keys/allow_list.py`).
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path

import zmq

from edge_sdk.errors import ConfigError, StorageError
from edge_sdk.files import create_file

# How the file of a public key is named, after that of the secret one.
PUBLIC_ENDING = ".pub"
_Z85 = re.compile(r"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")
# A key file is one short line; anything longer is not one.
_MAX_FILE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A public key and its secret; the secret never shows in a log."""

    public: str
    secret: str = field(repr=False)


def fingerprint(public: str) -> str:
    """Return a short form of a public key for people to compare."""
    digest = hashlib.sha256(public.encode()).hexdigest()[:16]
    return ":".join(digest[at : at + 4] for at in range(0, 16, 4))


def make_key_pair() -> KeyPair:
    """Return a fresh key pair that is written nowhere.

    Its public key begins with a letter or a digit and ends with no colon and not like the name of
    a file, so that neither YAML nor a command line takes it for something else.
    """
    if not zmq.has("curve"):
        raise ConfigError("this pyzmq has no CURVE; install it from a wheel: pip install pyzmq")
    while True:
        public, secret = (half.decode() for half in zmq.curve_keypair())
        if public[0].isalnum() and not public.endswith((":", PUBLIC_ENDING)):
            return KeyPair(public, secret)


def create_key_pair(path: str | Path) -> KeyPair:
    """Make a key pair, write it to *path* and *path*.pub, and return it; overwrite nothing."""
    path = Path(path)
    pair = make_key_pair()
    public_path = _public_path(path)
    for file in (path, public_path):
        if file.exists():
            raise StorageError(f"{file} exists already; keys are never overwritten")
    path.parent.mkdir(parents=True, exist_ok=True)
    # The mode is set at creation: until a later change of mode, others could read the key.
    create_file(path, pair.secret + "\n", 0o600)
    create_file(public_path, pair.public + "\n", 0o644)
    return pair


def load_key_pair(path: str | Path) -> KeyPair:
    """Read the key pair at *path*; refuse a secret that others can read."""
    path = Path(path)
    secret = _read(path, is_secret=True)
    try:
        public = zmq.curve_public(secret.encode()).decode()
    except (zmq.ZMQError, ValueError) as error:
        raise ConfigError(f"{path} holds no CURVE secret key: {error}") from error
    return KeyPair(public, secret)


def is_public_key(text: object) -> bool:
    """Return whether *text* is a public key as Z85 writes it."""
    return isinstance(text, str) and _Z85.fullmatch(text) is not None


def load_public_key(path_or_z85: str | Path) -> str:
    """Return a public key that is given as Z85, or as a file that holds it.

    A path may have 40 characters as well, all of them such as Z85 has: what is a file, or is named
    like one, is a file.
    """
    text, path = str(path_or_z85), Path(path_or_z85)
    is_file = isinstance(path_or_z85, Path) or text.endswith(PUBLIC_ENDING) or path.exists()
    if is_public_key(text) and not is_file:
        return text
    if not path.exists():
        raise ConfigError(f"{text!r} is neither a public key (40 characters of Z85) nor a file")
    return _read(path, is_secret=False)


def _public_path(path: Path) -> Path:
    return path.with_name(path.name + PUBLIC_ENDING)


def _read(path: Path, *, is_secret: bool) -> str:
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            data = file.read(_MAX_FILE_BYTES)
    except OSError as error:
        raise ConfigError(f"cannot read key {path}: {error.strerror}") from error
    if is_secret and os.name == "posix" and stat.S_IMODE(mode) & 0o077:
        raise ConfigError(f"{path} can be read by others, so it is no secret: chmod 600 {path}")
    text = data.decode("ascii", errors="replace").strip()
    if not _Z85.fullmatch(text):
        raise ConfigError(f"{path} holds no key (one line of 40 characters of Z85)")
    return text
