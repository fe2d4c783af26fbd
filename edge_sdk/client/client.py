"""`EdgeClient`: take part in a run, from a program's main thread or in the background.

    EdgeClient(ClientConfig(coordinator="tcp://10.0.0.1:7070", server_key="..."), rows).run()

Lost links are mended by the link, lost sessions here: the client greets the coordinator again and
goes on from its own checkpoint. What one device does in a run is `participant.py`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from edge_sdk.client.backends import choose_backend
from edge_sdk.client.callbacks import FAILED, Callback
from edge_sdk.client.config import ClientConfig
from edge_sdk.client.incoming import RunEnded, Stopped
from edge_sdk.client.participant import STOPPED, Participant
from edge_sdk.client.setup import Dataset, RuntimeSetup
from edge_sdk.errors import (
    EdgeError,
    OutOfMemory,
    SessionLost,
    TransportError,
    as_edge_error,
    is_out_of_memory,
    one_line,
)
from edge_sdk.transport.keys import load_key_pair, load_public_key
from edge_sdk.transport.link import Link, LinkConfig
from edge_sdk.transport.zmq_link import ZmqLink

if TYPE_CHECKING:  # readings of the board are no part of `import edge_sdk`
    from edge_sdk.client.board_monitor import BoardMonitor

log = logging.getLogger(__name__)

# Seconds after which a wrong server key, or nobody there, is reported.
FIRST_CONTACT_S = 10.0
# Seconds for the last words of a device; a coordinator that is away will find out by itself.
FAREWELL_S = 1.0
# A device that still runs out of memory after this many smaller plans gives up. Where there is no
# smaller one, the coordinator ends it earlier.
MOST_SMALLER_PLANS = 16
# Errors that the coordinator cannot be told of, or has told of itself.
_NOT_REPORTED = (TransportError, OutOfMemory)


class EdgeClient:
    """One device in one run.

    Args:
        config: Where the coordinator is, keys, data.
        dataset: Rows as dictionaries: any iterable, or a `torch.utils.data.Dataset`; None reads
            what `config.data` names.
        callback: What the application wants to hear of.
        link: A connection that is already open, for tests and simulation.
    """

    def __init__(
        self,
        config: ClientConfig,
        dataset: Dataset | None = None,
        callback: Callback | None = None,
        link: Link | None = None,
    ) -> None:
        self._config, self._dataset = config, dataset
        self._callback = callback or Callback()
        self._given_link = link
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def run(self) -> str:
        """Take part until the run is over; return the coordinator's closing words.

        Raises:
            EdgeError: what else ended it; `exit_code` tells its kind.
        """
        try:
            return self._run()
        except Exception as error:
            if is_out_of_memory(error) and not isinstance(error, OutOfMemory):
                raise OutOfMemory(_what_to_do(error)) from error
            raise

    def _run(self) -> str:
        choose_backend(self._config)  # what cannot work is better known before anybody is greeted
        if self._given_link is not None:
            return self._run_over(self._given_link)
        from edge_sdk.client.board_monitor import BoardMonitor

        with BoardMonitor() as monitor:  # its readings travel with every sign of life
            return self._run_over(self._open_link(monitor.telemetry), monitor)

    def _run_over(self, link: Link, monitor: BoardMonitor | None = None) -> str:
        setup = RuntimeSetup(self._config, self._dataset)
        participant = Participant(link, self._config, setup, self._callback, self._stop, monitor)
        reason, was_short = FAILED, False
        try:
            reason = self._take_part(participant)
        except TransportError as error:
            was_short = is_out_of_memory(error)
            raise
        finally:
            participant.close()
            if was_short:
                _quietly(participant.leave_note)
            link.close(FAREWELL_S)
            self._callback.on_train_end(reason)
        return reason

    def _open_link(self, telemetry: Callable[[], dict[str, float]]) -> ZmqLink:
        config = self._config
        self._callback.on_status(f"calling {config.coordinator}")
        return ZmqLink(
            LinkConfig(
                address=config.coordinator,
                server_key=load_public_key(config.server_key),
                keys=load_key_pair(config.secret_key),
                patience_s=config.patience_s,
                first_contact_s=min(FIRST_CONTACT_S, config.patience_s),
                chunk_bytes=config.chunk_bytes,
            ),
            telemetry,
        )

    def _take_part(self, participant: Participant) -> str:
        smaller = 0
        while True:
            try:
                participant.join()
                participant.serve()
            except RunEnded as ended:
                return str(ended)
            except Stopped:
                _quietly(participant.leave)
                return STOPPED
            except SessionLost as lost:
                log.info("session.lost reason=%s", lost)
                self._callback.on_disconnect(str(lost))
            except Exception as error:
                is_short = is_out_of_memory(error)
                if is_short:
                    log.warning("memory.exhausted times=%d reason=%s", smaller, _words(error))
                    participant.forget()
                    short = OutOfMemory(_words(error)).with_traceback(error.__traceback__)
                    _quietly(partial(participant.report, short))
                elif not isinstance(error, _NOT_REPORTED):
                    _quietly(partial(participant.report, as_edge_error(error)))
                # Without its link it cannot be given another plan.
                is_over = smaller == MOST_SMALLER_PLANS or isinstance(error, TransportError)
                if is_over or not is_short:
                    raise
                smaller += 1

    # ---- in the background ----

    def start(self) -> EdgeClient:
        """Take part in a thread of its own; `wait` tells how it ended."""
        assert self._thread is None, "started already"
        self._thread = threading.Thread(target=self._run_quietly, name="edgesplit", daemon=True)
        self._thread.start()
        return self

    def _run_quietly(self) -> None:
        try:
            self.run()
        except BaseException as error:  # noqa: BLE001 - handed to whoever waits
            self._error = error

    def stop(self) -> None:
        """Leave the run soon; the local checkpoint stays. Any thread may call this."""
        self._stop.set()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until the client has ended; return whether it has.

        Raises:
            EdgeError: what it ended with.
        """
        if self._thread is not None:
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                return False
        if self._error is not None:
            raise self._error
        return True

    def __enter__(self) -> EdgeClient:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()
        self.wait()


def _words(error: BaseException) -> str:
    """Return what an error says, or what it is where it says nothing."""
    return one_line(error) or type(error).__name__


def _what_to_do(error: BaseException) -> str:
    return (
        f"out of memory: {_words(error)}; close other programs on this device, or lower "
        "micro_batch, split or max_length on the coordinator"
    )


def _quietly(say: Callable[[], None]) -> None:
    """Say a last word; it is not worth another error."""
    try:
        say()
    except EdgeError as error:
        log.debug("farewell.lost reason=%s", error)
