"""What all tools share: how their command lines are read, and how they end: an exit code, and one line of an error."""

from __future__ import annotations

import argparse
import logging
import os
import re
import select
import sys
from collections.abc import Callable, Sequence
from io import TextIOWrapper
from pathlib import Path
from traceback import extract_tb
from typing import Any, NoReturn

from engine.errors import InputError, Preempted, RunError
from engine.text import expanded

FAILED = 2
PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: the same command with --resume goes on; schedulers can requeue on it
INTERRUPTED = 130  # 128 + SIGINT, as shells count
READER_GONE = 141  # 128 + SIGPIPE: nobody reads standard output any more, as where it goes to `head`
OVERRIDE = re.compile(r"[A-Za-z_][\w.\[\]]*=.*", re.DOTALL)  # no option begins so, and no URL


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, as all others."""

    def error(self, message: str) -> NoReturn:
        """End with code 2; of an option that is a key of the configuration it is said how keys are written."""
        from engine.config_file import keys_named  # here: no other command line needs OmegaConf to be read

        option = re.match(r"unrecognized arguments: --([\w-]+)", message)
        keys = keys_named(option[1].replace("-", "_")) if option else []
        meant = f"did you mean {' or '.join(f'{key}=…' for key in keys)}?" if keys else "--help says what is allowed"
        self.exit(FAILED, f"error: {message}; {meant}\n")


def tool_parser(description: str, epilog: str | None = None) -> Parser:
    """The parser of a tool's command line. From here on any text can be read and printed, whatever the locale.

    What the terminal's encoding has not is printed as an escape, on standard output as Python does on standard error.
    """
    if sys.getfilesystemencoding() != "utf-8":  # names in configurations, and text in files, are UTF-8
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    return Parser(description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter)


def parse_with_overrides(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, meaning: str = "of the configuration"
) -> argparse.Namespace:
    """Read a command line in which `key=value` may stand anywhere, after options that take several words too.

    Args:
        arguments: None: of this process.
        meaning: what the help says of them.
    """
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=meaning)
    words = sys.argv[1:] if arguments is None else [*map(str, arguments)]
    overrides = [word for word in words if OVERRIDE.fullmatch(word) and not os.path.exists(expanded(word))]
    parsed = parser.parse_intermixed_args([word for word in words if word not in overrides])
    parsed.overrides = [*overrides, *parsed.overrides]
    return parsed


def as_path(text: str) -> Path:
    """The type of an argument that names a file or a folder: `~` is a home folder."""
    return Path(expanded(text))


class AtLeast(argparse.Action):
    """Of an option whose number must be at least `const`: one line otherwise."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        """Keep the number; InputError for one that is too small."""
        if values < self.const:
            raise InputError(f"{option_string} {values}: allowed is {self.const} or more")
        setattr(namespace, self.dest, values)


def main_of(
    parse: Callable[[Sequence[str] | None], argparse.Namespace],
    run: Callable[[argparse.Namespace], None],
    after_interrupt: str = "",
) -> Callable[..., int]:
    """The `main` of a tool: reads a command line (None: this process's), does what it asks for, returns the exit code.

    Args:
        after_interrupt: what the user can do after Ctrl-C.
    """

    def main(arguments: Sequence[str] | None = None) -> int:
        return exit_code(lambda: run(parse(arguments)), after_interrupt=after_interrupt)

    return main


def exit_code(run: Callable[[], int | None], traceback: bool = False, after_interrupt: str = "") -> int:
    """Run a tool: 0, or what it returns; 2 with one line after an error, 75 after a preemption, 130 after Ctrl-C.

    141 where nobody reads its output any more.

    Args:
        traceback: let errors through.
        after_interrupt: what the user can do then.
    """
    try:
        code = run() or 0
        sys.stdout.flush()
        return code
    except Preempted as stop:
        return _end(PREEMPTED, f"{stop}; --resume goes on")
    except KeyboardInterrupt:
        return _end(INTERRUPTED, f"interrupted: {after_interrupt}" if after_interrupt else "interrupted")
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            return READER_GONE
        if traceback:
            raise
        return _end(FAILED, f"error: {error if isinstance(error, RunError) else _unforeseen(error)}")


def log_to_terminal() -> None:
    """What is logged goes to standard output, without decoration. For the main process."""
    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    logging.getLogger().setLevel(logging.INFO)


def launched_rank() -> int:
    """Rank given by the launcher, 0 without one."""
    return int(os.environ.get("RANK", 0))


def launched_processes() -> int:
    """Number of processes given by the launcher, 1 without one."""
    return int(os.environ.get("WORLD_SIZE", 1))


def leave(code: int, processes: int) -> NoReturn:
    """End this process; if it is one of several, without the interpreter's own end.

    Under FSDP2 threads of gloo and of autograd outlive the process group, and abort the process when they want the
    interpreter while it is torn down: a run that is done would count as failed.
    """
    if processes == 1:
        sys.exit(code)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _reader_is_gone() -> bool:
    """Whether standard output was closed by who reads it; what is still to be written then goes nowhere."""
    output, pipe = sys.stdout.fileno(), select.poll()
    pipe.register(output, 0)
    is_gone = any(event & select.POLLERR for _, event in pipe.poll(0))
    if is_gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return is_gone


def _unforeseen(error: Exception) -> str:
    place, reason = extract_tb(error.__traceback__)[-1], " ".join(str(error).split()) or "no reason given"
    return f"{type(error).__name__}: {reason} (unforeseen, in {place.filename}, line {place.lineno})"


def _end(code: int, line: str) -> int:
    rank, line = launched_rank(), " ".join(line.splitlines())
    print(f"[rank {rank}] {line}" if rank else line, file=sys.stderr)
    return code
