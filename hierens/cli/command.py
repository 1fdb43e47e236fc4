"""Commands: tyro reads flags from the fields of a dataclass of settings, and help fits on a screen.

tyro's own help lists all flags of all nested configs on several screens; `--help-all` shows it.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro

from hierens.core.errors import did_you_mean

_Settings = TypeVar("_Settings")
_WIDTH, _FLAGS = 100, 30  # columns of help, and of its flags
_HELP = ("-h", "--help", "--help-all")


class UsageError(ValueError):
    """The command line is wrong; nothing was done."""


@dataclass(frozen=True)
class Flag:
    """One flag as help and completion show it.

    Attributes:
        name: as typed, `--data-dir`; for a positional argument as shown in usage, `MODEL`.
        kind: type of its value, such as `INT`; empty for a switch.
        about: the field's docstring.
        default: its default value.
        choices: the allowed values, if they can be listed.
    """

    name: str
    kind: str
    about: str
    default: Any = None
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Command:
    """A command of the program.

    Attributes:
        name: as typed.
        summary: one line.
        settings: a dataclass with a flag per field, also of nested dataclasses.
        run: a function of the arguments after the name.
        positional: positional arguments, as shown in usage.
        extra: flags that are not fields of `settings`.
        often: names of the fields that `--help` shows, by default all; `--help-all` shows all.
        examples: lines below the flags.
    """

    name: str
    summary: str
    settings: type
    run: Callable[[Sequence[str]], Any]
    positional: str = ""
    extra: tuple[Flag, ...] = ()
    often: tuple[str, ...] = ()
    examples: tuple[str, ...] = ()

    def flags(self, default: Any = None) -> list[Flag]:
        """All flags, with default values from an instance of the settings if one is given."""
        return [*self.extra, *_flags(self.settings, default)]

    def parse(self, arguments: Sequence[str], default: Any = None, description: str = "") -> Any:
        """The settings from the arguments. If these ask for help, it is printed and the program ends.

        Args:
            arguments: those after the command's name.
            default: an instance of the settings with the default values.
            description: replaces the summary in help.

        Raises:
            UsageError: a flag does not exist; if a value does not fit, tyro ends the program with exit code 2.
        """
        if "--help-all" not in arguments and set(_HELP) & set(arguments):
            print(self.help(default, description))
            raise SystemExit(0)
        self._check_names(arguments)
        about = [description or self.summary, *(line for flag in self.extra for line in _lines(flag))]
        return tyro.cli(
            tyro.conf.OmitArgPrefixes[self.settings],  # type: ignore[misc, name-defined]
            args=["--help"] if "--help-all" in arguments else list(arguments),
            description="\n".join(about),
            prog=f"hierens {self.name}",
            **({} if default is None else {"default": default}),
        )

    def given(self, arguments: Sequence[str]) -> set[str]:
        """The fields that are given as arguments."""
        names = {_flag_name(argument).removeprefix("--no-").removeprefix("--") for argument in arguments}
        return {_field(flag) for flag in self.flags() if flag.name.removeprefix("--") in names}

    def in_flags(self, message: str) -> str:
        """A message of the library with this command's flags in place of arguments: `blocks=3` as `--blocks 3`."""
        names = "|".join(_field(flag) for flag in self.flags() if flag.name.startswith("--"))
        value = r"'[^']*'|\[[^]]*\]|[\w.+-]*\w"

        def flag(found: re.Match[str]) -> str:
            return f"--{found[1].replace('_', '-')} {re.sub(r'[][,]', '', found[2]).strip(chr(39))}"

        message = re.sub(rf"(?<![^\s(])({names})=({value})(?![^\s,:;.)])", flag, message)
        return re.sub(rf"^({names})(?= must )", lambda found: f"--{found[1].replace('_', '-')}", message)

    def help(self, default: Any = None, description: str = "") -> str:
        """Usage, the most common flags, examples."""
        flags = self.flags(default)
        shown = [flag for flag in flags if not self.often or flag in self.extra or _field(flag) in self.often]
        hidden = len(flags) - len(shown)
        more = [f"--help-all lists {hidden} more flags."] if hidden else []
        return "\n".join(
            [
                " ".join(f"usage: hierens {self.name} {self.positional} [flags]".split()),
                "",
                *(description.strip().splitlines() or textwrap.wrap(f"{self.summary}.", _WIDTH)),
                "",
                *(line for flag in shown for line in _lines(flag)),
                *(["", *more] if more else []),
                *(["", *(f"  {line}" for line in self.examples)] if self.examples else []),
            ]
        )

    def _check_names(self, arguments: Sequence[str]) -> None:
        known = [flag.name for flag in self.flags() if flag.name.startswith("--")]
        switches = [f"--no-{flag.name[2:]}" for flag in self.flags() if not flag.kind]
        for argument in arguments:
            name = _flag_name(argument)
            if name.startswith("--") and name not in (*known, *switches, *_HELP):
                raise UsageError(f"hierens {self.name} has no flag {name}{did_you_mean(name, known)}.")


def _flags(settings: type, default: Any) -> Iterator[Flag]:
    """The flags of a dataclass and of those nested in it."""
    kinds, docs = get_type_hints(settings, include_extras=True), _docs(settings)
    for field in dataclasses.fields(settings):
        kind, positional = kinds[field.name], False
        value = getattr(default, field.name) if default is not None else _default(field)
        if dataclasses.is_dataclass(kind):
            yield from _flags(kind, value)  # type: ignore[arg-type]
            continue
        if get_origin(kind) is Annotated:
            positional, kind = True, get_args(kind)[0]
        name = field.name.upper() if positional else f"--{field.name.replace('_', '-')}"
        shown = "" if positional else _kind(kind)
        yield Flag(name, shown, docs.get(field.name, ""), None if positional else value, _choices(kind))


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


@cache
def _docs(settings: type) -> dict[str, str]:
    """The docstring of each field of a class."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(settings))).body
    assert isinstance(body, ast.ClassDef)
    return {
        field.target.id: " ".join(str(below.value.value).split())
        for field, below in pairwise(body.body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
    }


def _kind(kind: Any) -> str:
    """The name of a type in help."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return "|".join(map(str, inner))
    if origin in (Union, UnionType):
        return "|".join(_kind(one) for one in inner if one is not NoneType)
    if origin is tuple:
        return f"{_kind(inner[0])}..." if inner[-1] is Ellipsis else " ".join(map(_kind, inner))
    return {str: "TEXT", bool: "", int: "INT", float: "NUMBER"}.get(kind, "JSON")


def _choices(kind: Any) -> tuple[str, ...]:
    inner = get_args(kind)
    if get_origin(kind) is Literal:
        return tuple(map(str, inner))
    return _choices(inner[0]) if get_origin(kind) in (Union, UnionType) else ()


def _flag_name(argument: str) -> str:
    return argument.partition("=")[0].replace("_", "-")


def _field(flag: Flag) -> str:
    return flag.name.removeprefix("--").replace("-", "_")


def _lines(flag: Flag) -> list[str]:
    """The lines of a flag in help."""
    empty = flag.default is None or flag.default is False or flag.default in ("", (), {})
    shown = " ".join(map(str, flag.default)) if isinstance(flag.default, tuple) else str(flag.default)
    about = textwrap.wrap(flag.about + ("" if empty else f" [{shown}]"), _WIDTH - _FLAGS) or [""]
    head = f"  {flag.name} {flag.kind}".rstrip()
    if len(head) > _FLAGS - 2:
        return [head, *(" " * _FLAGS + line for line in about)]
    return [f"{head:{_FLAGS}}{about[0]}", *(" " * _FLAGS + line for line in about[1:])]
