"""Every exception this project raises on purpose, and the exit code with which it ends a program.

    EdgeError                  1
    + ConfigError              2   the configuration is wrong
    + TransportError           3   the link failed; the same may be tried again
      + ReceiveTimeout             nothing arrived in time
      + PeerGone                   the other side left
        + SessionLost              the coordinator restarted and does not know us: say Hello again
    + RefusedError             4   the coordinator does not want this device: key, version, model
      + NotAccepted                this device does not want what the coordinator asks for
    + ProtocolError            5   a message broke the protocol
      + LocalProtocolError         ours did
      + RemoteProtocolError        the peer's did
    + DeviceError              6   this machine cannot do what the plan asks: memory, compute
    + DataError                7   the training data is missing, malformed or unusable
    + ModelError               8   the model is missing, unreadable or of a shape we cannot cut
    + StorageError             9   a file could not be written or read back: disk full, read-only
    + NumericError            10   NaN or infinity where a number was due

A program stopped by Ctrl-C ends with 130, as shells expect.

Whoever handles what the other side has sent asks `blames_peer` whose fault an error is. With
RefusedError, RemoteProtocolError and NumericError it is the other side, whose part ends. All else
is trouble of our own: it ends our program, and nobody else is blamed for it.
"""

from __future__ import annotations

import errno
from typing import ClassVar


class EdgeError(Exception):
    """Base of every exception this project raises on purpose."""

    exit_code: ClassVar[int] = 1
    blames_peer: ClassVar[bool] = False
    """Whether, in whoever handles a message, the one that sent it is to blame."""
    is_public: ClassVar[bool] = False
    """Whether a device may tell its words to the coordinator: they speak of what came from there or
    of its own settings, and hold nothing of its data and files."""


class ConfigError(EdgeError):
    """The configuration is wrong; the message names the key, the value and what is allowed."""

    exit_code = 2


class TransportError(EdgeError):
    """The link failed; the same message may be tried again."""

    exit_code = 3


class ReceiveTimeout(TransportError):
    """Nothing arrived in time."""


class PeerGone(TransportError):
    """The other side left, or has been silent for too long."""


class SessionLost(PeerGone):
    """The coordinator restarted and does not know this session; the client says Hello again."""


class RefusedError(EdgeError):
    """The coordinator refused this device: unknown key, other version, other model."""

    exit_code = 4
    blames_peer = True
    is_public = True


class NotAccepted(RefusedError):
    """This device does not do what the coordinator asks for, by its own `accept` settings."""


class ProtocolError(EdgeError):
    """A message broke the protocol."""

    exit_code = 5


class LocalProtocolError(ProtocolError):
    """We tried to send, or were asked to do, something the protocol forbids."""


class RemoteProtocolError(ProtocolError):
    """The peer sent something the protocol forbids."""

    blames_peer = True
    is_public = True


class DeviceError(EdgeError):
    """This machine cannot do what the plan asks of it."""

    exit_code = 6


class OutOfMemory(DeviceError):
    """The plan does not fit this machine's memory; the coordinator makes a smaller one."""


class DataError(EdgeError):
    """The data is missing, malformed or unusable; the message names the file and the line."""

    exit_code = 7


class ModelError(EdgeError):
    """The model is missing, unreadable, or of a shape that cannot be cut into blocks."""

    exit_code = 8


class StorageError(EdgeError):
    """A file could not be written or read back."""

    exit_code = 9


class NumericError(EdgeError):
    """NaN or infinity where a finite number was due."""

    exit_code = 10
    blames_peer = True
    is_public = True


def told_text(error: EdgeError) -> str:
    """Return what a device says to the coordinator of *error*, beside its class: its place.

    Words of libraries, of other people's templates and of our own readers may hold a line of the
    data, a path or a name: they stay here. The place is one of our own source.
    """
    if error.is_public:
        return public_text(error)
    place, trace, cause = "", error.__traceback__, error.__cause__
    if trace is None and cause is not None:
        trace = cause.__traceback__
    while trace is not None:
        module = str(trace.tb_frame.f_globals.get("__name__", ""))
        if module.partition(".")[0] in ("edge_sdk", "profiler"):
            place = f"raised in {module}, line {trace.tb_lineno}; "
        trace = trace.tb_next
    if type(error) is EdgeError and type(cause).__module__ == "builtins" and cause is not None:
        place = f"{type(cause).__name__}, {place}"
    return f"{place}what it says stands on the device's terminal alone"


def public_name(error: EdgeError) -> str:
    """Return the name of the error's nearest class in this file: what the other side knows."""
    return next(kind.__name__ for kind in type(error).__mro__ if kind.__module__ == __name__)


# How libraries say that memory is exhausted where they raise no error of a type of its own, in
# small letters.
OUT_OF_MEMORY = (
    "out of memory",  # CUDA and its drivers
    "out_of_memory",  # their constants
    "cannot allocate memory",  # the C library: ENOMEM
    "can't allocate memory",  # torch's allocator for the CPU
    "not enough memory",  # the same, in other versions
    "insufficient memory",
    "unable to allocate",  # numpy
    "failed to allocate memory",  # onnxruntime's arena
    "bad_alloc",  # C++
    "can't start new thread",  # no room for its stack
    "alloc_failed",  # cuBLAS, cuDNN, cuSOLVER
    "allocation_failed",  # cuDNN 9
    "cudaerrormemoryallocation",
    "cublas_status_not_initialized",  # a handle of cuBLAS or cuDNN that found no room
    "cudnn_status_not_initialized",
    "nvml_success == r internal assert",  # a Jetson, whose allocator is not the desktop's
    "nvmapmem",
)
# ld.so says it on arm64 of a library that was loaded too late: no plan is small enough for that.
NOT_OUT_OF_MEMORY = "static tls block"


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether *error* is how Python, a library or the kernel say that memory is exhausted.

    So is one that was raised because of such an error. What an error of ours says in words does not
    count: it may speak of the other side.
    """
    chain, seen = error, {id(error)}
    while not _says_out_of_memory(chain):
        before = chain.__cause__ or (None if chain.__suppress_context__ else chain.__context__)
        if before is None or id(before) in seen:
            return False
        chain = before
        seen.add(id(chain))
    return True


def _says_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, EdgeError):
        return False
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    text = str(error).lower()
    return NOT_OUT_OF_MEMORY not in text and any(words in text for words in OUT_OF_MEMORY)


def as_edge_error(error: Exception) -> EdgeError:
    """Return *error*, or what stands for it where nobody foresaw that it would end a program."""
    if isinstance(error, EdgeError):
        return error
    if is_out_of_memory(error):
        return OutOfMemory(f"out of memory: {one_line(error) or type(error).__name__}")
    if isinstance(error, OSError):
        found: EdgeError = StorageError(one_line(error))
    else:
        text = f"{type(error).__name__}: {one_line(error)}"
        found = EdgeError(f"an error that nobody foresaw; --log-level info shows where: {text}")
    found.__cause__ = error
    return found


# Letters that a text may have on the wire, in a file of the run or on a terminal.
MAX_TEXT = 1000


def one_line(error: BaseException | str) -> str:
    """Return a message as one line for a terminal, whatever a library or a peer has put into it."""
    return printable(" ".join(str(error).split()))


def printable(text: str) -> str:
    """Return *text* with `?` for what is no letter: controls, escapes, changes of direction."""
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def public_text(error: BaseException | str) -> str:
    """Return a message as it may be sent, written down and shown: one line, not too long of it."""
    line = one_line(error)
    return line if len(line) <= MAX_TEXT else f"{line[: MAX_TEXT - 3]}..."


INTERRUPTED_EXIT_CODE = 130
