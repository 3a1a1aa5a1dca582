"""Shared by all command-line scripts: one parser, one kind of user error, one spelling of flags, one YAML reader."""

import difflib
import errno
import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Optional, Union, get_args, get_origin

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

# EFBIG: a limit on the size of a file. EDQUOT, an exceeded quota, is not defined on every system.
DISK_FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}
_NO_PERMISSION = {errno.EACCES, errno.EPERM, errno.EROFS}
# Errors of the operating system for paths that only the user can have named.
_NO_NAMES = {errno.ENAMETOOLONG, errno.EINVAL, errno.ELOOP, errno.ENOTDIR, errno.EISDIR}

# Control characters, except line breaks and tabs: a terminal would obey them instead of showing them.
_CONTROL = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}

# Python reads bytes that are not UTF-8 as these characters.
_NOT_UTF8 = re.compile("[\ud800-\udfff]")
_FLAG_NAME = re.compile("(?<=^--)[^=]+")

# How jsonargparse reports an unknown name: for a flag, below a group, or in a YAML file (with or without its parent).
_UNKNOWN_NAME = (
    r"[Uu]nrecognized arguments: --([\w.]+)",
    r"Group '([\w.]+)' does not accept nested key '([\w.]+)'",
    r"Parser key \"([\w.]+)\".*[Kk]ey '([\w.]+)' (?:is not expected|does not exist)",
    r"[Kk]ey '([\w.]+)' (?:is not expected|does not exist)",
)
_TYPE_NAMES = {
    type(None): "null",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
}


class UserError(ValueError):
    """A mistake that the user can fix.

    The message says what was found, what was expected, and the command that fixes it. Scripts print it as one message
    and exit with code 1. Every other exception is a bug and keeps its traceback.
    """


def run_cli(
    function: Callable[..., Any], argv: Sequence[str] | None = None, *, optional_positional: str | None = None
) -> Any:
    """Parse the command line for the signature of ``function``, call it, and turn user mistakes into one message.

    Args:
        function: its parameters (annotated; dataclasses allowed) become flags, their docstrings the help texts; those
            without a default become positional.
        argv: the arguments, ``sys.argv[1:]`` when None.
        optional_positional: name of a parameter with a default that may also be given first and without its flag.

    Raises:
        SystemExit: with code 1 after a message on stderr (130 after Ctrl-C), with code 0 after ``--help``.
    """
    return exit_with_message(lambda: _call(function, argv, optional_positional))


def exit_with_message(call: Callable[[], Any]) -> Any:
    """Run ``call``. A user mistake, a full disk or a refused file becomes one message and exit code 1."""
    for stream in (sys.stdout, sys.stderr):
        # A stream that was replaced, as in a notebook, cannot be reconfigured.
        if isinstance(stream, io.TextIOWrapper):
            # Write line by line, also into files and pipes, and never fail on a console's code page.
            stream.reconfigure(line_buffering=True, errors="replace")
    try:
        return call()
    except UserError as error:
        message = str(error)
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        # 128 + SIGINT: the exit code of a process that Ctrl-C ended, as shells report it.
        raise SystemExit(130) from None
    except OSError as error:
        # Other errors of the operating system are bugs, so they keep their traceback.
        message = _describe_os_error(error)
        if not message:
            raise
    print(f"error: {strip_control_chars(message)}", file=sys.stderr)
    raise SystemExit(1)


def strip_control_chars(text: str) -> str:
    """Replace control characters, so that text from a model or a file can be printed to a terminal."""
    return text.translate(_CONTROL)


def command(script: str, *arguments: object) -> str:
    """Return a command line of one of the scripts that can be pasted into a shell.

    Args:
        script: such as ``generate.py``.
        arguments: flags and values, one each; they are quoted if the shell needs it.
    """
    return " ".join(["uv run python", script, *map(quoted, arguments)])


def quoted(argument: object, *, windows: bool = os.name == "nt") -> str:
    """Quote a value as one argument: for POSIX shells, or for Windows in double quotes (cmd and PowerShell)."""
    text = str(argument)
    if not windows:
        return shlex.quote(text)
    escaped = subprocess.list2cmdline([text])  # quotes spaces only, no other special characters
    if escaped.startswith('"') or re.fullmatch(r"[\w.:/\\=+-]+", text):
        return escaped
    backslashes = len(escaped) - len(escaped.rstrip("\\"))  # they would escape the closing quote
    return f'"{escaped}{backslashes * chr(92)}"'


def make_parser(*, with_help: bool = True, **kwargs: Any) -> ArgumentParser:
    """Return a jsonargparse parser that raises ``ArgumentError``.

    Args:
        with_help: use the docstrings of fields as help texts. Reading them from the source files takes about as long
            as parsing.
        kwargs: of the parser.
    """
    # A setting of the process, not of one parser.
    set_parsing_settings(docstring_parse_attribute_docstrings=with_help)
    # Otherwise the parser prints its own message and exits, before `explain` can shorten it.
    return ArgumentParser(exit_on_error=False, **kwargs)


def asks_for_help(argv: Sequence[str]) -> bool:
    """Return whether the arguments contain ``--help``, or that of one class (``--data.help``)."""
    return any(argument == "-h" or argument.split("=")[0].endswith("help") for argument in argv)


def parse(parser: ArgumentParser, argv: Sequence[str] | None) -> Any:
    """Parse ``argv``; dashes and underscores in flags are equal.

    Raises:
        UserError: for anything that the parser rejects (an unknown flag names the nearest known one), and as
            ``underscored``.
    """
    arguments = with_bare_switches(parser, underscored(sys.argv[1:] if argv is None else argv))
    try:
        return parser.parse_args(arguments)
    except ArgumentError as error:
        raise UserError(explain(str(error), parser, known_flags(parser), arguments)) from None


def current_class_path(text: str) -> str:
    """Replace the module names of 0.1.0 in a class path, alone or within a flag: ``recipe.training.muon.Muon``."""
    # Checkpoints and run files of 0.1.0 contain these paths.
    text = re.sub(r"\brecipe\.data\.(module\.)?", "litmoe.data.", text)
    return re.sub(r"\brecipe\.training\.", "litmoe.train.", text)


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the settings in a YAML file, with the class paths of today's modules.

    Raises:
        UserError: there is no such file, or it is no mapping in YAML.
    """
    if not path.is_file():
        raise UserError(f"no config file at {path}; expected a YAML file. The shipped ones are in configs/.")
    try:
        # safe_load builds no objects from tags, which could run code of a stranger.
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        json.dumps(content, default=str, skipkeys=True)  # rejects anchors that contain themselves, an endless structure
    except OSError:
        raise
    except Exception as error:  # not only YAML's own errors: 2026-99-99, `!!int x` and ten thousand `[` raise others
        raise UserError(f"{path} is not valid YAML: {str(error)[:500] or type(error).__name__}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {type(content).__name__}; expected a YAML mapping of settings.")
    return with_current_class_paths(content)


def with_current_class_paths(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a run file or a checkpoint with the class paths of today's modules."""
    settings = dict(settings)
    for group in ("data", "optimizer"):
        chosen = settings.get(group)
        if isinstance(chosen, str):
            settings[group] = current_class_path(chosen)
        elif isinstance(chosen, dict) and isinstance(chosen.get("class_path"), str):
            settings[group] = {**chosen, "class_path": current_class_path(chosen["class_path"])}
    return settings


def underscored(argv: Iterable[str]) -> list[str]:
    """Replace dashes in flags: ``--micro-batch-size=4`` becomes ``--micro_batch_size=4``. Values do not change.

    Raises:
        UserError: an argument is not UTF-8, as in a Latin-1 terminal, and not the name of an existing file.
    """
    arguments = list(argv)
    for argument in arguments:
        value = re.sub("^--[^=]*=", "", argument)
        if _NOT_UTF8.search(argument) and not Path(value).exists():
            raise UserError(
                f"the argument {argument!r} holds bytes that are not UTF-8; expected UTF-8. Use a terminal in UTF-8"
                " (locale: a name that ends in .UTF-8), or write the value into a file that the script reads."
            )
    # What follows a -- is never a flag.
    end = [*arguments, "--"].index("--")
    flags = [_FLAG_NAME.sub(lambda name: name[0].replace("-", "_"), argument) for argument in arguments[:end]]
    return flags + arguments[end:]


def with_bare_switches(parser: ArgumentParser, argv: Sequence[str]) -> list[str]:
    """Give switches without a value the value true: ``--overwrite`` becomes ``--overwrite=true``."""
    switches = {
        option
        for action in parser._actions
        for option in action.option_strings
        if getattr(action, "_typehint", None) in (bool, bool | None, Optional[bool])  # noqa: UP045 - another object
    }
    values = ("true", "false", "yes", "no", "null")
    return [
        f"{argument}=true" if argument in switches and following.lower() not in values else argument
        for argument, following in zip(argv, [*argv, ""][1:], strict=True)
    ]


def known_flags(parser: ArgumentParser) -> list[str]:
    """Return the names of all flags of a parser, without their dashes."""
    flags = (option for action in parser._actions for option in action.option_strings)
    return [flag.lstrip("-") for flag in flags if flag.startswith("--")]


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name most similar to ``name`` or to its last part; None if none is similar."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not close:
        # Reversed: of several settings with the same last part, the first one is suggested.
        by_last_part = {key.rsplit(".", 1)[-1]: key for key in reversed(known)}
        similar = difflib.get_close_matches(name.rsplit(".", 1)[-1], by_last_part, n=1, cutoff=0.75)
        close = [by_last_part[similar[0]]] if similar else []
    return close[0] if close else None


def explain(message: str, parser: ArgumentParser, known: Iterable[str], arguments: Sequence[str] = ()) -> str:
    """Shorten a message of jsonargparse.

    Args:
        message: of the error.
        parser: the parser that raised it, which knows the types.
        known: the names of all settings; the nearest one is suggested for an unknown name.
        arguments: the flags that were parsed.
    """
    message = re.sub(r"\n\s*\n+", "\n", message.strip())
    for pattern in _UNKNOWN_NAME:
        if match := re.search(pattern, message, re.DOTALL):
            name = ".".join(match.groups())
            suggestion = nearest(name, known)
            hint = f"the nearest known one is {suggestion!r}" if suggestion else "no known one is similar"
            return f"unknown setting {name!r}; {hint}. `--help` lists all of them."
    return (_wrong_value(message, parser, arguments) or message) + "\n`--help` lists all flags and their types."


def _wrong_value(message: str, parser: ArgumentParser, arguments: Sequence[str]) -> str | None:
    """Return a plain message for a value of the wrong type; None if the type has no plain name."""
    key = re.match(r'Parser key "([\w.]+)":', message)
    if key is None:
        return None
    types = {action.dest: getattr(action, "_typehint", None) for action in parser._actions}
    expected = _type_in_words(types.get(key[1]))
    if expected is None:
        return None
    # For a value that is none of a Literal, the message of jsonargparse 4.41 does not contain the value: the flags do.
    before_value = rf"(?:Given value: |Got value: |^--{re.escape(key[1])}[=\n])"
    value = re.search(f"{before_value}(.*)", "\n".join([message, *arguments]), re.MULTILINE)
    if value is None:
        return f"{key[1]}: expected {expected}."
    # jsonargparse shows Python's None, but a run file contains null.
    return f"{key[1]} is {value[1].replace('None', 'null')}; expected {expected}."


def _type_in_words(hint: Any) -> str | None:
    origin = get_origin(hint)
    if origin is Literal:
        return ", ".join(map(str, get_args(hint)))
    if origin not in (list, Union, UnionType):
        return _TYPE_NAMES.get(hint)
    parts = [_type_in_words(part) for part in get_args(hint)]
    if None in parts:
        return None
    beginning = "a list of " if origin is list else ""
    return beginning + " or ".join(map(str, parts))


def _call(function: Callable[..., Any], argv: Sequence[str] | None, optional_positional: str | None) -> Any:
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = make_parser(with_help=asks_for_help(arguments))
    parser.add_function_arguments(function, as_positional=True, sub_configs=True)
    # argparse offers a parameter either as positional or as a flag, so the value gets its flag here.
    if optional_positional and arguments and not arguments[0].startswith("-"):
        arguments[0] = f"--{optional_positional}={arguments[0]}"
    settings = parse(parser, arguments)
    return function(**parser.instantiate_classes(settings).as_dict())


def _describe_os_error(error: OSError) -> str:
    place = f" ({error.filename})" if error.filename else ""
    if error.errno in DISK_FULL:
        return f"the disk is full{place}; free some space and run the same command again."
    if error.errno in _NO_PERMISSION:
        return f"no permission to write or read{place}; choose another folder or change its permissions."
    if error.errno in _NO_NAMES and place:
        return f"{error.strerror}{place}; name another file or folder."
    return ""
