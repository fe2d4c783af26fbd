"""Key files: secret, never overwritten, and clear about what is wrong."""

import os
from pathlib import Path

import pytest
import yaml

from edge_sdk.errors import ConfigError, StorageError
from edge_sdk.transport import keys


def test_pair_comes_back(tmp_path: Path) -> None:
    """What was created is what is loaded, and the public file holds the public key."""
    pair = keys.create_key_pair(tmp_path / "deep" / "device.key")

    assert keys.load_key_pair(tmp_path / "deep" / "device.key") == pair
    assert keys.load_public_key(tmp_path / "deep" / "device.key.pub") == pair.public
    assert keys.load_public_key(pair.public) == pair.public


def test_secret_is_for_its_owner_only(tmp_path: Path) -> None:
    """The secret is created readable by its owner alone, whatever the umask."""
    old = os.umask(0)
    try:
        keys.create_key_pair(tmp_path / "k")
    finally:
        os.umask(old)

    assert (tmp_path / "k").stat().st_mode & 0o777 == 0o600


def test_readable_secret_is_refused_with_the_remedy(tmp_path: Path) -> None:
    """A secret that others can read is not used, and one line says how to repair it."""
    keys.create_key_pair(tmp_path / "k")
    (tmp_path / "k").chmod(0o640)

    with pytest.raises(ConfigError) as error:
        keys.load_key_pair(tmp_path / "k")

    assert f"chmod 600 {tmp_path / 'k'}" in str(error.value)
    assert "\n" not in str(error.value)


def test_keys_are_never_overwritten(tmp_path: Path) -> None:
    """Creating a pair where one is fails and leaves it alone."""
    pair = keys.create_key_pair(tmp_path / "k")

    with pytest.raises(StorageError, match="exists"):
        keys.create_key_pair(tmp_path / "k")

    assert keys.load_key_pair(tmp_path / "k") == pair


@pytest.mark.parametrize("content", [b"", b"short", b"\xff" * 40, b"x" * 10_000])
def test_garbage_is_no_key(tmp_path: Path, content: bytes) -> None:
    """A file without a key is refused with its name."""
    (tmp_path / "k").write_bytes(content)
    (tmp_path / "k").chmod(0o600)

    with pytest.raises(ConfigError, match="k holds no key"):
        keys.load_key_pair(tmp_path / "k")


def test_missing_key_is_named() -> None:
    """A key that is neither a file nor Z85 is shown in the error."""
    with pytest.raises(ConfigError, match="nowhere"):
        keys.load_public_key("nowhere.pub")


def test_secret_does_not_show_and_fingerprints_differ() -> None:
    """The secret is in no repr; two keys have two fingerprints."""
    one, two = keys.make_key_pair(), keys.make_key_pair()

    assert one.secret not in repr(one)
    assert keys.fingerprint(one.public) != keys.fingerprint(two.public)


def test_a_new_public_key_needs_no_quotes_in_yaml() -> None:
    """Whatever is drawn, its first and last letter mean nothing to YAML and to a command line."""
    for _ in range(200):
        public = keys.make_key_pair().public

        assert public[0].isalnum()
        assert yaml.safe_load(f"key: {public}") == {"key": public}


def test_a_path_of_forty_characters_is_no_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies there, or is named like a file of a key, is a file, although a key looks alike."""
    monkeypatch.chdir(tmp_path)
    pair = keys.make_key_pair()
    names = ("d" * 36 + ".pub", "k" * 40)
    for name in names:
        Path(name).write_text(pair.public, "ascii")

    assert [keys.load_public_key(name) for name in names] == [pair.public] * 2
    for name in names:
        Path(name).unlink()
    with pytest.raises(ConfigError, match="nor a file"):
        keys.load_public_key(names[0])
    assert keys.load_public_key(names[1]) == names[1]
