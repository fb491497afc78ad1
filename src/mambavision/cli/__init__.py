"""The command line: `mambavision COMMAND ...`, the same as `python -m mambavision COMMAND ...`.

Each command is a module of this package with a one-line `SUMMARY` and `main(argv) -> int`, and imports what is heavy
inside `main`, so that help and mistyped commands answer at once.

Exit codes: 0 all done, 1 part of the input failed, 2 wrong use or an output that is there already, 130 interrupted.
"""

from __future__ import annotations

import difflib
import io
import logging
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from mambavision import __version__

COMMANDS = (
    "classify",
    "explain",
    "embed",
    "neighbours",
    "demo",
    "models",
    "info",
    "train",
    "evaluate",
    "benchmark",
    "profile",
    "export",
)
EXTRAS = {"train": "train", "evaluate": "train"}  # of which a command needs packages


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; expected errors become one sentence on stderr."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help(), file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"mambavision {__version__}")
        return 0
    command, *rest = arguments
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1, cutoff=0.6)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(COMMANDS)}."
        return _fail(f"unknown command {command!r}; {hint}")
    return _run(command, rest)


def _run(command: str, arguments: list[str]) -> int:
    logger = logging.getLogger("mambavision")
    handler = logging.StreamHandler()
    logger.addHandler(handler)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name the terminal cannot show must not end the run
    try:
        code: int = import_module(f"mambavision.cli.{command}").main(arguments)
        sys.stdout.flush()  # so that a closed pipe shows here and not at exit
        return code
    except SystemExit as request:  # argparse: help, or wrong use
        return request.code if isinstance(request.code, int) else 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at exit
        return 141  # as the shell reports a reader that left
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "mambavision"):
            raise
        extra = EXTRAS.get(command)
        install = package if extra is None else f'-e ".[{extra}]" in the clone'
        return _fail(f"{command} needs {package}, which is not installed: pip install {install}.")
    except FileExistsError as error:
        return _fail(f"{error.filename} is a file, and a folder is needed there; choose another place for the output.")
    except OSError as error:
        return _fail(str(error) if error.filename is None else f"{error.filename}: {error.strerror}.")
    except Exception as error:
        if not type(error).__module__.startswith("mambavision."):  # ours say what the user can do
            raise
        return _fail(str(error))
    finally:
        logger.removeHandler(handler)


def _fail(sentence: str) -> int:
    print(f"mambavision: {sentence}", file=sys.stderr)
    return 2


def _help() -> str:
    commands = [f"  {name:12}{import_module(f'mambavision.cli.{name}').SUMMARY}" for name in COMMANDS]
    return "\n".join(
        [
            "usage: mambavision [-h] [--version] COMMAND ...",
            "",
            "MambaVision: classify, explain and embed pictures, or try it in a browser;",
            "inspect, train, evaluate, measure and export the models.",
            "",
            "commands:",
            *commands,
            "",
            "Try `mambavision classify --samples`; `mambavision COMMAND --help` tells a command's options.",
        ]
    )
