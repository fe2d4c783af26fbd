"""An app that takes part with what its users have typed: rows from SQLite, not from a data file.

    python app.py dialogs.db device.yaml [key=value ...]

Everything in device.yaml is as for `edge-sdk run`; of `data`, the path is not looked at.
"""

import signal
import sqlite3
import sys
from contextlib import closing

from edge_sdk import Callback, ClientConfig, EdgeClient, EdgeError, RoundSummary, load_config


class Display(Callback):
    """What the app shows. Called from the client's thread, so it does not keep it waiting."""

    def on_connect(self, run: str) -> None:
        print(f"taking part in {run}", flush=True)

    def on_round_end(self, summary: RoundSummary) -> None:
        print(f"round {summary.round + 1}: loss {summary.train_loss:.4f}", flush=True)

    def on_disconnect(self, reason: str) -> None:
        print(f"offline ({reason}); goes on when the coordinator is back", flush=True)

    def on_train_end(self, reason: str) -> None:
        print(f"ended: {reason}", flush=True)


def rows(database: str) -> list[dict[str, str]]:
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        found = connection.execute("SELECT question, answer FROM dialogs WHERE may_train")
        return [{"prompt": question, "completion": answer} for question, answer in found]


def main(database: str, config: str, *overrides: str) -> int:
    try:
        settings = load_config(ClientConfig, config, overrides)
        client = EdgeClient(settings, rows(database), Display()).start()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: client.stop())
        while not client.wait(timeout_s=1.0):
            pass  # the app does its own work here
    except EdgeError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]) if len(sys.argv) > 2 else __doc__)
