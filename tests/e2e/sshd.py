"""A real sshd of a test's own on the loopback, behind which this machine is a board."""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from edge_sdk.deadline import Deadline
from tests.e2e.programs import free_port

SSHD = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:/sbin")


@dataclass
class Sshd:
    """A server of our own on a port of the loopback, and how to log in."""

    port: int
    identity: Path

    def board(self, folder: Path) -> dict[str, Any]:
        """The config of a board behind it whose files are in *folder*."""
        options = ("StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR")
        words = [word for option in options for word in ("-o", option)]
        return {
            "ssh": f"{getpass.getuser()}@127.0.0.1",
            "port": self.port,
            "identity": str(self.identity),
            "ssh_options": ["-F", "/dev/null", *words],
            "workdir": str(folder),
            "python": sys.executable,
        }


@contextmanager
def serving_ssh(tmp_path: Path, *more: str) -> Iterator[Sshd]:
    """Serve ssh with keys made in *tmp_path*; *more* are lines of the server's config."""
    if SSHD is None or shutil.which("ssh") is None:
        pytest.skip("sshd is not installed")
    for name in ("host", "login"):
        words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / name)]
        subprocess.run(words, check=True)
    separation = Path("/run/sshd")  # only root's server asks for it
    is_ours = os.getuid() == 0 and not separation.exists()
    if is_ours:
        separation.mkdir(mode=0o755)
    port, config = free_port(), tmp_path / "sshd_config"
    config.write_text(
        f"ListenAddress 127.0.0.1:{port}\nHostKey {tmp_path / 'host'}\nPidFile none\n"
        f"AuthorizedKeysFile {tmp_path / 'login.pub'}\nStrictModes no\nUsePAM no\n"
        "PermitRootLogin prohibit-password\n" + "".join(f"{line}\n" for line in more)
    )
    log = (tmp_path / "sshd.log").open("wb")
    server = subprocess.Popen([SSHD, "-D", "-e", "-f", str(config)], stderr=log)
    try:
        deadline = Deadline.after(10.0)
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1.0).close()
                break
            except OSError:
                said = (tmp_path / "sshd.log").read_text()
                if server.poll() is not None or not deadline.left_s():
                    pytest.skip(f"sshd does not start: {said.strip()}")
                time.sleep(0.05)
        yield Sshd(port, tmp_path / "login")
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()
        log.close()
        if is_ours:
            separation.rmdir()
