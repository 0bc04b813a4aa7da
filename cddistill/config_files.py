"""Config files: from "configs/ccd_sr.py:pe" or "cddistill:ccd_sr" and texts for single fields to a ConfigDict.

Heavy imports happen within functions, so that the command line reports a wrong option at once.
"""

import difflib
import inspect
import pathlib
import re
import traceback

from ml_collections import ConfigDict

import cddistill
from cddistill import io, typed


def config_file(spec: str) -> tuple[pathlib.Path, str]:
    """File and variant, "" for none, of "file.py:variant" or "cddistill:name:variant", a config of the package."""
    name, _, variant = spec.partition(":")
    if name != "cddistill":
        return pathlib.Path(name).expanduser(), variant
    package = pathlib.Path(cddistill.__file__).parent
    installed = package / "configs"
    name, _, variant = variant.partition(":")
    return (installed if installed.is_dir() else package.parent / "configs") / f"{name}.py", variant


def load_config(spec: str) -> ConfigDict:
    """The config of a file, as `config_file` has it. ValueError, naming the file, if it cannot be made."""
    path, variant = config_file(spec)
    if not path.is_file():
        raise ValueError(missing(path))
    scope = {"__name__": path.stem, "__file__": str(path)}
    try:
        exec(compile(path.read_bytes(), str(path), "exec"), scope)
        if not (get_config := scope.get("get_config")):
            raise ValueError(f"{path} has no function get_config(): it must return a config, as configs/ccd_sr.py does")
        if variant and not inspect.signature(get_config).parameters:
            raise ValueError(f"{path} has no variants: leave out :{variant}")
        settings = get_config(*[variant] * bool(variant))
        if not isinstance(settings, ConfigDict | dict):
            what = f"returned {type(settings).__name__}: it must return a config"
            raise ValueError(f"get_config() of {path} {what}, as that of configs/ccd_sr.py does")
        settings = ConfigDict(settings) if isinstance(settings, dict) else settings
        io.flatten(settings.to_dict())  # raises if it holds itself, or a value that is to be set later
        return settings.lock()
    except (Exception, SystemExit) as error:  # the file is a program, which can raise anything
        raise config_error(path, error) from error


def missing(path: pathlib.Path) -> str:
    """The sentence for a config file that does not exist, with one that does."""
    if path.is_dir():
        return f"config file {path} is a folder: choose one of its files"
    there = {x.stem: x for folder in (pathlib.Path("configs"), path.parent) for x in folder.glob("*.py")}
    close = difflib.get_close_matches(path.stem, there, 1, 0.7)
    hint = "start in the folder that holds configs/, or give a full path"
    return f"config file {path} does not exist; {f'did you mean {there[close[0]]}?' if close else hint}"


def config_error(path: pathlib.Path, error: BaseException) -> ValueError:
    """An error that a config file raised, with its line; one that is the file's own keeps its traceback as a note."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    if understood := config_mistake(path, error, frames):
        return ValueError(understood)
    where = f"config file {path}" + "".join(f", line {frame.lineno}" for frame in frames[-1:])
    said = " ".join(str(error).split())
    if isinstance(error, SystemExit):
        said = f"it ends the program ({error!r}), and a config file must return a config"
    elif not isinstance(error, ValueError):
        said = f"{type(error).__name__}: {said}"
    refusal = ValueError(f"{where}: {said}")
    if frames:
        own = [*traceback.format_list(frames), *traceback.format_exception_only(error)]
        refusal.add_note(f"Traceback within {path}:\n{''.join(own)}".rstrip())
    return refusal


def config_mistake(path: pathlib.Path, error: BaseException, frames) -> str:
    """The sentence for a config file's error that is no mystery, such as an unknown key; "" for others."""
    said = " ".join(str(error).split())
    if isinstance(error, ValueError) and path.name in said:
        return said
    if isinstance(error, SyntaxError):
        return f"{path}, line {error.lineno or 1}: {error.msg}"
    where = f"{path}, line {frames[-1].lineno}" if frames else str(path)
    if key := re.search(r'(?:Key|instead of) "([^"]+)"', said):  # a ConfigDict's
        from cddistill.config import methods_with, owners

        near = typed.nearest(key[1], owners())
        having = ", ".join(methods_with(near.rpartition(".")[2])) if near.startswith("method.") else ""
        hint = f"did you mean {near!r}?{f' (of the method {having})' * bool(having)}" if near else "--help lists all"
        return f"{where}: unknown config key {key[1]!r}: {hint}"
    if wrong := re.search(r"field '(\w+)'.*?\. (.+) is of original type <class '(\w+)'> .* type <class '(\w+)'>", said):
        return f"{where}: {wrong[1]} must be {wrong[4]}, not {wrong[3]} {wrong[2]}"
    return ""


def override(settings: ConfigDict, overrides: list[tuple[str, str]], spec: str) -> ConfigDict:
    """The config with fields, (name, text) as on the command line, each of the type that it had. spec is what it was
    loaded from. ValueError for unknown ones."""
    texts = {}
    for field, text in overrides:
        texts.setdefault(field, []).append(text)
    for field, given in texts.items():
        if field in ("method", "method.name"):
            check_method(settings, given[-1], spec)
        node, *path = settings, *field.split(".")
        for part in path:
            if not isinstance(node, ConfigDict) or part not in node:
                raise ValueError(unknown(field, settings))
            parent, node = node, node[part]
        if isinstance(node, ConfigDict):
            raise ValueError(f"config.{field} is a group: set a field, such as --config.{field}.{next(iter(node))}")
        parent[path[-1]] = typed.parse(given, node, f"config.{field}")
    return settings


def check_method(settings: ConfigDict, asked: str, spec: str) -> None:
    """ValueError if another method is asked for than the config file has: its options would not be that method's."""
    from cddistill.config import method_of
    from cddistill.methods import METHODS

    if asked == (now := method_of(settings)):
        return
    typed.choose("method.name", METHODS, asked)
    own, start = config_file(spec)[0], f'defaults("{asked}")'
    others = [path for path in sorted(own.parent.glob("*.py")) if start in path.read_text("utf-8", "ignore")]
    hint = f"such as --config={others[0]}" if others else f"one that starts from {start}"
    raise ValueError(f"the config file {own} chose the method {now}: for {asked} pass a config file of it, {hint}")


def unknown(field: str, settings: ConfigDict) -> str:
    """The sentence for a field that a config does not have."""
    from cddistill.config import foreign, method_of

    if said := foreign(field, method_of(settings)):
        return said
    near, leaf = typed.nearest(field, io.flatten(settings.to_dict())), field.rpartition(".")[2]
    if not near:
        return f"unknown config key {field!r}: --help lists all"
    if leaf == near.rpartition(".")[2]:
        return f"unknown config key {field!r}: did you mean --config.{near}?"
    return f"unknown config key {leaf!r}: did you mean {near.rpartition('.')[2]!r}? (--config.{near})"
