# SPDX-License-Identifier: Apache-2.0
"""One exception family; the class decides the exit code, the message is one line: path, fact, remedy."""

from __future__ import annotations


class NeoxError(Exception):
    """Something the user can act on. Printed as one line, without a traceback.

    The message reads `PATH: fact; remedy`, so that it stands alone behind `neox-shard: error: `.
    """

    exit_code = 1


class UsageError(NeoxError):
    """The command line or the configuration is wrong."""

    exit_code = 2


class DataError(NeoxError):
    """Input data is malformed or truncated."""

    exit_code = 65


class InputMissing(NeoxError):
    """An input file, checkpoint or library is not there."""

    exit_code = 66


class PeerLost(NeoxError):
    """Another rank of a distributed run died or hangs."""

    exit_code = 69


class OutOfMemory(NeoxError):
    """Host or device memory ran out."""

    exit_code = 71


class OutputExists(NeoxError):
    """The output exists already, or cannot be created where it was asked for."""

    exit_code = 73


class StorageError(NeoxError):
    """Reading or writing failed: disk full, I/O error."""

    exit_code = 74


class StoppedEarly(NeoxError):
    """Stopped on request with all state saved; the same command, run again, continues."""

    exit_code = 75


class UnsafeInput(NeoxError):
    """The input asks for something that would be unsafe: code in a pickle, a path out of its archive."""

    exit_code = 77


class NonFiniteLoss(NeoxError):
    """The loss or the gradient became NaN or infinite."""

    exit_code = 80


class IntegrityError(NeoxError):
    """A stored hash or size does not match the bytes found."""

    exit_code = 81


INTERRUPTED = 130  # 128 + SIGINT
EXIT_CODES = """\
exit codes: 0 done; 2 usage or config; 65 bad or truncated data; 66 input missing; 69 a peer rank was lost;
71 out of memory; 73 output exists or cannot be created; 74 I/O error, disk full; 75 stopped early with state
saved, run the same command again; 77 refused as unsafe; 80 non-finite loss; 81 integrity check failed;
130 interrupted; 141 reader went away; 1 a bug of ours."""
