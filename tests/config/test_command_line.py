"""The command line, which scripts rely on: commands, options, what they take and what they are if left out.

Where a change of it is meant, read the difference, and put the file that the test names in the place of the stored one.
"""

import inspect
import typing
from pathlib import Path

from xdscale.cli import app

STORED = Path(__file__).with_name("command_line.txt")


def commands(group, words=("xdscale",)):
    """Yields every command's words, panel, help and function, those of groups behind each group's own."""
    if group.registered_callback:
        yield words, None, "of a group", group.registered_callback.callback
    for command in group.registered_commands:
        name = command.name or command.callback.__name__.strip("_").replace("_", "-")
        yield (*words, name), command.rich_help_panel, command.help or command.callback.__doc__, command.callback
    for inner in group.registered_groups:
        panel = inner.rich_help_panel if isinstance(inner.rich_help_panel, str) else None
        if isinstance(inner.name, str):
            assert inner.typer_instance.info.no_args_is_help is True, inner.name
            yield (*words, inner.name), panel, inner.help or inner.typer_instance.info.help, lambda: None
        yield from commands(inner.typer_instance, (*words, inner.name) if isinstance(inner.name, str) else words)


def kind_of(annotation):
    """Returns the name of a type, the same with every version of Python."""
    inner = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Literal:
        return "|".join(inner)
    if type(None) in inner:
        return f"{kind_of(inner[0])} or None"
    return f"list of {kind_of(inner[0])}" if inner else annotation.__name__


def described(name, parameter):
    """Returns what a parameter takes, in one line."""
    kind, *infos = parameter.annotation.__origin__, *parameter.annotation.__metadata__
    info = next(info for info in infos if hasattr(info, "param_decls"))
    assert info.help or info.metavar == "section.key=value" or info.hidden, name
    parts = [f"  {' '.join(info.param_decls or ()) or name} {type(info).__name__.removesuffix('Info').lower()}"]
    parts.append(kind_of(kind))
    parts += [f"[{info.min}, {info.max}]"] * ((info.min, info.max) != (None, None))
    parts += [f"= {parameter.default}"] * (parameter.default is not parameter.empty)
    stated = {
        key: getattr(info, key) for key in ("metavar", "rich_help_panel", "exists", "dir_okay", "file_okay", "is_eager")
    }
    usual = {"exists": False, "dir_okay": True, "file_okay": True, "is_eager": False}
    parts += [f"{key}={value}" for key, value in stated.items() if value is not None and value != usual.get(key)]
    return " ".join(parts)


def test_commands_and_options_are_what_scripts_know(tmp_path):
    assert app.info.no_args_is_help is True
    assert not app.pretty_exceptions_enable  # Python's own tracebacks, which do not print the values of variables
    lines = []
    for words, panel, help, function in commands(app):
        assert help, words
        lines.append(" ".join(words) + (f" ({panel})" if panel else ""))
        for name, parameter in inspect.signature(function, eval_str=True).parameters.items():
            lines += [described(name, parameter)]
    found = "\n".join(lines) + "\n"
    (tmp_path / STORED.name).write_text(found, encoding="utf-8")
    assert found == STORED.read_text(encoding="utf-8"), f"found: {tmp_path / STORED.name}"
