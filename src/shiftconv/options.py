"""What stands on the command line as the arguments of a function, and mistakes in it as one line.

Floor 0: knows no verb and imports nothing heavy.
"""

import re
from argparse import ArgumentError
from collections.abc import Callable
from inspect import signature
from typing import TYPE_CHECKING, Any

from shiftconv.names import closest

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


def parse(parser: "ArgumentParser", argv: list[str]) -> Any:
    """What the options say, as objects."""
    try:
        return parser.instantiate(parser.parse_args(argv))
    except ArgumentError as error:
        raise ValueError(_mistake(error, parser)) from None


def _mistake(error: ArgumentError, parser: "ArgumentParser") -> str:
    """What the parser complains about, in one line, with the name that was probably meant."""
    text = " ".join(str(error).split()).replace("Unexpected config:", "expected names and values of settings")
    options = list(parser.get_defaults().keys())
    if key := re.search(r'Parser key "([^"]+)".* (?:Got|Given) value: (.*)', text):
        if choices := re.search(r"Literal\[(.*?)\]", text):
            names = re.findall(r"'([^']+)'", choices[1])
            close = closest(key[2], names)
            return f"{key[1]} must be one of {', '.join(names)}, got {key[2]}" + (
                f"; did you mean {close}?" if close else ""
            )
        kinds = " or ".join(dict.fromkeys(re.findall(r"Expected an? <class '(\w+)'>", text)))
        return f"{key[1]} must be {kinds.replace('NoneType', 'null')}, got {key[2]}" if kinds else text
    if wrong := re.search(r"unrecognized arguments: --([^\s=]+)|[Oo]ption '([^']+)'", text):
        name = wrong[1] or wrong[2]
        last = {option.rpartition(".")[2]: option for option in options}  # of short names more are alike by accident
        close = closest(name, last, cutoff=0.7)
        close = closest(name, options) if close is None else last[close] if wrong[1] else close  # a file has mappings
        hint = f"did you mean {close}?" if close else "an argument of the network goes as --model_args.NAME"
        return f"unknown option {name}; {hint}" if close or "model_args" in options else f"unknown option {name}"
    return text


def spell(argv: list[str], verb: str, function: Callable[..., None]) -> list[str]:
    """Options as the parser spells them: underscores for dashes, --expansion 3 as one of model_args, 3,5 as a list."""
    parameters = signature(function).parameters
    spelt = []
    for word, following in zip(argv, [*argv, "--"][1:], strict=True):
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            if verb == "eval" and name == "checkpoint":  # as the authors' program had it; here it stands by its place
                spelt += [value] if equals else []
                continue
            if "model_args" in parameters and name.split(".")[0] not in (*parameters, "help"):
                if close := closest(name, parameters, cutoff=0.8):
                    raise ValueError(f"unknown option --{name}; did you mean --{close}?")
                name = f"model_args.{name}"
            elif (
                not equals and following.startswith("-") and name in parameters and parameters[name].annotation is bool
            ):
                equals, value = "=", "true"  # a flag
            word = f"--{name}{equals}{value}"
        elif re.fullmatch(r"\(?\d+(, ?\d+)+\)?", word):
            word = f"[{word.strip('()')}]"
        spelt.append(word)
    return spelt
