# SPDX-License-Identifier: Apache-2.0
"""Manners shared by the commands: options, stdout, errors, signals and exit codes.

A command is a plain function with typer annotations. `run` adds `--version` and `--debug`, hands the function the
private `stdout` if it asks for one, and turns every way a function can end into the documented exit code.
Nothing here, and nothing at the top of a command's module, imports numpy, torch or another heavy library:
`--help`, `--version` and usage errors must answer at once.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import functools
import inspect
import os
import signal
import sys
from collections.abc import Callable, Mapping
from typing import Annotated, Any, BinaryIO, NoReturn, get_type_hints

# Plain help costs a third of the start-up time of typer's rich panels, and reads the same in a pipe.
os.environ.setdefault("TYPER_USE_RICH", "0")

import typer

from libneox.errors import EXIT_CODES, INTERRUPTED, InputMissing, NeoxError, StorageError, UsageError

Command = Callable[..., None]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr, only warnings and errors.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout instead of text.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the output if it exists.")]


def run(prog: str, default: Command, verbs: Mapping[str, Command] | None = None) -> NoReturn:
    """Run a command line to its end and exit with the documented code.

    Args:
        prog: the command's name, as its users type it.
        default: the function that serves `prog ARGS`.
        verbs: functions that serve `prog VERB ARGS`. A file called like a verb is written `./VERB`.
    """
    verbs = verbs or {}
    argv = sys.argv[1:]
    command, name = default, prog
    if argv and argv[0] in verbs:
        command, name = verbs[argv[0]], f"{prog} {argv[0]}"
        argv = argv[1:]
    debug = "--debug" in argv
    _hold_descriptors()
    signal.signal(signal.SIGTERM, _raise_terminated)
    try:
        _typer_command(prog, name, command, verbs if command is default else {})(argv, name)
    except BaseException as error:  # the one place where every ending becomes an exit code
        sys.exit(_exit_code(prog, error, debug))
    sys.exit(0)


def warn(prog: str, message: str) -> None:
    """Print one line on stderr: something the user should know that is no error."""
    print(f"{prog}: {message}", file=sys.stderr, flush=True)


def refuse_terminal(stdout: BinaryIO, what: str) -> None:
    """Raise UsageError if binary data would be written to a terminal."""
    if stdout.isatty():
        raise UsageError(f"stdout is a terminal and {what} is binary; redirect it to a file or a pipe")


class _Terminated(BaseException):
    """SIGTERM, as an exception: context managers remove their temporary files on the way out."""


class _Interrupted(BaseException):
    """SIGINT while a command ran."""


class _ReaderGone(BaseException):
    """The reader of our stdout has closed it."""


def _raise_terminated(signum: int, frame: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second one ends the process at once
    raise _Terminated


def _typer_command(prog: str, name: str, command: Command, verbs: Mapping[str, Command]) -> Callable[..., None]:
    app = typer.Typer(add_completion=True, pretty_exceptions_enable=False, rich_markup_mode=None)
    summaries = [f"{prog} {verb}: {_summary(function)}" for verb, function in verbs.items()]
    epilog = "\n\n".join([*(["Verbs, each with its own --help:", *summaries] if summaries else []), EXIT_CODES])
    app.command(name, epilog=epilog, context_settings={"help_option_names": ["-h", "--help"]})(_wrap(prog, command))
    click_command = typer.main.get_command(app)

    def invoke(argv: list[str], name: str) -> None:
        try:
            click_command.main(argv, prog_name=name, standalone_mode=False)
        except Exception as error:
            # click's own errors (typer vendors click) carry format_message and mean a usage error
            if hasattr(error, "format_message"):
                raise UsageError(f"{error.format_message()} (see {name} --help)") from error
            raise

    return invoke


def flat(command: Command) -> Command:
    """The command with the fields of every dataclass among its parameters as parameters of their own, all by name.

    A dataclass whose fields are annotated as options are is how several commands share a list of them.
    """
    signature = inspect.signature(command, eval_str=True)
    groups = {p.name: p.annotation for p in signature.parameters.values() if dataclasses.is_dataclass(p.annotation)}
    parameters: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        if parameter.name in groups:
            parameters += _parameters_of(groups[parameter.name])
        else:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))

    @functools.wraps(command)
    def wrapper(**values: Any) -> None:
        for name, group in groups.items():
            fields = [field.name for field in dataclasses.fields(group) if field.name in values]
            values[name] = group(**{field: values.pop(field) for field in fields})
        command(**values)

    _set_signature(wrapper, parameters)
    return wrapper


def _parameters_of(group: Any) -> list[inspect.Parameter]:
    hints, keyword = get_type_hints(group, include_extras=True), inspect.Parameter.KEYWORD_ONLY
    return [
        inspect.Parameter(
            field.name,
            keyword,
            default=inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in dataclasses.fields(group)
    ]


def _set_signature(function: Any, parameters: list[inspect.Parameter]) -> None:
    """Give a wrapper a signature, in all places where one is looked for."""
    function.__signature__ = inspect.Signature(parameters)
    function.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    del function.__wrapped__  # its annotations would be read instead


def _summary(function: Command) -> str:
    return (inspect.getdoc(function) or "").split("\n", 1)[0]


def _wrap(prog: str, command: Command) -> Command:
    """Add --version and --debug to a command, and give it its private stdout."""
    command = flat(command)
    signature = inspect.signature(command)
    parameters = [p for p in signature.parameters.values() if p.name != "stdout"]

    def print_version(value: bool) -> None:
        if value:
            from importlib.metadata import version

            typer.echo(f"{prog} {version(prog)}")
            raise typer.Exit

    version_option = Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and exit.")
    ]
    debug_option = Annotated[bool, typer.Option("--debug", help="Print a traceback with an error.")]
    keyword = inspect.Parameter.KEYWORD_ONLY
    extra = [
        inspect.Parameter("neox_version", keyword, default=False, annotation=version_option),
        inspect.Parameter("debug", keyword, default=False, annotation=debug_option),
    ]

    @functools.wraps(command)
    def wrapper(**values: Any) -> None:
        del values["neox_version"], values["debug"]
        stdout = _private_stdout()
        if "stdout" in signature.parameters:
            values["stdout"] = stdout
        try:
            command(**values)
            stdout.flush()
        except (BrokenPipeError, KeyboardInterrupt) as error:  # click would make exit codes of its own of these
            raise (_ReaderGone if isinstance(error, BrokenPipeError) else _Interrupted) from error
        except OSError as error:
            if error.errno == errno.EBADF and not error.filename:
                raise StorageError("stdout is closed; the data has nowhere to go") from error
            raise

    _set_signature(wrapper, [*parameters, *extra])
    return wrapper


def _hold_descriptors() -> None:
    """Keep the numbers of a stdin and a stderr that the caller closed from files that are opened later.

    In stdin's place is a directory, which cannot be read, in stderr's /dev/null. For stdout see `_private_stdout`.
    """
    try:
        os.fstat(0)
    except OSError:
        os.open(os.sep, os.O_RDONLY)  # gets the lowest number
    try:
        os.fstat(2)
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        if nowhere != 2:
            os.dup2(nowhere, 2)
            os.close(nowhere)
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115 - for as long as the process lives


def _private_stdout() -> BinaryIO:
    """Move stdout to a private descriptor and point descriptor 1 at stderr.

    After this no print of any library, in Python or C, can put a byte into the data.
    """
    try:
        private = fcntl.fcntl(1, fcntl.F_DUPFD_CLOEXEC, 3)  # never 0, which may be closed and then means stdin
    except OSError:  # closed by the caller: data has nowhere to go, errors say so when it is written
        nowhere = os.open(os.devnull, os.O_RDONLY)
        private = fcntl.fcntl(nowhere, fcntl.F_DUPFD_CLOEXEC, 3)
        os.close(nowhere)
    os.dup2(2, 1)
    return os.fdopen(private, "wb")


def _exit_code(prog: str, error: BaseException, debug: bool) -> int:
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    if debug:
        import traceback

        traceback.print_exception(error)
    if isinstance(error, _ReaderGone | BrokenPipeError):
        return _die_of_sigpipe()
    if isinstance(error, KeyboardInterrupt | _Interrupted) or type(error).__name__ == "Abort":
        return INTERRUPTED
    if isinstance(error, _Terminated):
        return 128 + signal.SIGTERM
    code, message = _describe(error)
    print(f"{prog}: error: {message}", file=sys.stderr, flush=True)
    return code


def _describe(error: BaseException) -> tuple[int, str]:
    if isinstance(error, NeoxError):
        return error.exit_code, str(error)
    if _is_out_of_memory(error):
        first = str(error).split("\n", 1)[0]
        return 71, f"out of memory ({first}); use a smaller batch or fewer workers" if first else "out of memory"
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
        return InputMissing.exit_code, f"{os.fsdecode(error.filename or '?')}: {error.strerror}"
    if isinstance(error, PermissionError):
        return 73, f"{os.fsdecode(error.filename or '?')}: {error.strerror}"
    if isinstance(error, OSError):
        where = f"{os.fsdecode(error.filename)}: " if error.filename else ""
        remedy = "; free some space and run the command again" if error.errno == errno.ENOSPC else ""
        return 74, f"{where}{error.strerror or error}{remedy}"
    return 1, f"internal error: {type(error).__name__}: {error}; this is a bug, --debug shows where"


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, also by torch's errors: a class that is not imported here, and a RuntimeError."""
    torchs = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and torchs)


def _die_of_sigpipe() -> int:
    """End as a C program whose reader went away: silently, killed by SIGPIPE (the shell reports 141)."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    os.dup2(devnull, 2)  # no "Exception ignored" of a buffer that cannot be flushed any more
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGPIPE)
    return 141
