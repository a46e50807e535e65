"""The command line: ``shiftconv VERB [options]``. Each verb is one function; its signature is its options."""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from shiftconv._version import __version__
from shiftconv.cli import verbs
from shiftconv.cli.training import run_train, summary, train, verb_parser
from shiftconv.cli.verbs import line
from shiftconv.names import unknown
from shiftconv.options import parse, spell
from shiftconv.train.endings import FAILED, INTERRUPTED, ElsewhereError, Stopped

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

# Names with a line at their end are not those of public functions, which jsonargparse would import to compare both.
VERBS: dict[str, Callable[..., None]] = {
    "demo": verbs.demo,
    "list": verbs.list_,
    "train": train,
    "eval": verbs.evaluate,
    "report": verbs.report_,
    "bench": verbs.bench,
    "count": verbs.count_,
    "convert": verbs.convert_,
    "doctor": verbs.doctor,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the command; a user's mistake ends in one line on stderr and exit status 2."""
    try:
        _run(list(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except Stopped as stopped:
        _complain("", str(stopped))
        sys.exit(stopped.status)
    except ElsewhereError:
        sys.exit(FAILED)
    except BrokenPipeError:  # the reader of our output has gone, as in `shiftconv list | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:  # a person sees one line, whatever it was
        if os.environ.get("SHIFTCONV_TRACEBACK"):
            raise
        text = " ".join(str(error).split())
        if not isinstance(error, ValueError | TypeError | ImportError | OSError | RuntimeError):
            text = f"{type(error).__name__}: {text} (unexpected; SHIFTCONV_TRACEBACK=1 shows where)"
        _complain("error: ", text)
        sys.exit(getattr(error, "status", FAILED))  # a launched process's own


def _complain(kind: str, text: str) -> None:
    """One line on stderr. Of several processes the first speaks for all when they stop, and each of its own errors."""
    number = os.environ.get("RANK") or (os.environ.get("SLURM_PROCID") if "SLURM_STEP_ID" in os.environ else None)
    others = number not in (None, "0")
    if not others or kind:
        who = f"process {number}: " if others else ""
        sys.stderr.write(f"shiftconv: {kind}{who}{text}\n")


def _run(argv: list[str]) -> None:
    verb = argv[0] if argv else "--help"
    if verb in ("-h", "--help"):
        line(_usage())
    elif verb == "--version":
        line(f"shiftconv {__version__}")
    elif verb not in VERBS:
        raise unknown("verb", verb, VERBS)
    elif verb == "train":
        run_train(argv[1:])
    else:
        VERBS[verb](**vars(parse(_parser(verb), spell(argv[1:], verb, VERBS[verb]))))


def _usage() -> str:
    verbs = (f"  {name:<9}{summary(function)}" for name, function in VERBS.items())
    return "\n".join(["usage: shiftconv VERB [options]", "", *verbs, "", "shiftconv VERB --help tells the options."])


def _parser(verb: str) -> "ArgumentParser":
    """The parser of a verb, made from the signature and docstring of its function."""
    skip: dict[str, set[str | int]] = {"list": {"what"}, "count": {"model"}, "report": {"runs"}}
    parser = verb_parser(verb, VERBS[verb], skip.get(verb))
    if verb == "list":
        parser.add_argument("what", nargs="*", help="models, recipes or data, and patterns such as 'slak*'.")
    if verb == "report":
        parser.add_argument("runs", nargs="+", type=Path, help="folders that train has written.")
    if verb == "count":
        parser.add_argument(
            "model", nargs="?", type=str | None, help="network name; found in the checkpoint if absent."
        )
    return parser
