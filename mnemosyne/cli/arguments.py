"""The words after the command, checked and quoted before Hydra reads them."""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from collections.abc import Iterable
from importlib import resources

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

# Hydra's flags that make sense here, and whether a value follows.
FLAGS = {
    "--help": False,
    "-h": False,
    "--hydra-help": False,
    "--cfg": True,
    "-c": True,
    "--resolve": False,
    "--package": True,
    "-p": True,
    "--multirun": False,
    "-m": False,
    "--config-dir": True,
    "-cd": True,
    "--info": True,
    "-i": True,
}
LITERAL_KEY = "prompt"  # its value is taken as it stands; other texts may hold ${...} and A,B
ESCAPED_KEY = "stop"  # shells and Hydra leave these two characters as they are; here they are one
ESCAPES = {r"\n": "\n", r"\t": "\t", r"\r": "\r", r"\\": "\\"}


def nearest(word: str, choices: Iterable[str]) -> str:
    """The choice most like a word; the last part of a dotted one, taken alone, counts as well."""

    def likeness(choice: str) -> tuple[float, float]:
        whole, last = (
            difflib.SequenceMatcher(None, word, part).ratio()
            for part in (choice, choice.rpartition(".")[2])
        )
        return max(whole, last), whole

    return max(choices, key=likeness)


def key_types(config: type) -> dict[str, object]:
    """Type of every key, dotted, that a config dataclass has, nested dataclasses included."""
    types: dict[str, object] = {}
    for name, kind in typing.get_type_hints(config).items():
        types[name] = kind
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            types |= {f"{name}.{inner}": found for inner, found in key_types(kind).items()}
    return types


def describe_type(kind: object) -> str:
    """A type as a user of the command line knows it: ``float | None`` is "float or null"."""
    if typing.get_origin(kind) is list:
        return "list"
    names = [part.__name__ for part in typing.get_args(kind) or (kind,) if isinstance(part, type)]
    return " or ".join("null" if name == "NoneType" else name for name in names)


def group_options() -> dict[str, list[str]]:
    """Config groups and their options."""
    folders = [entry for entry in resources.files("mnemosyne.conf").iterdir() if entry.is_dir()]
    groups = {
        folder.name: sorted(
            entry.name.removesuffix(".yaml")
            for entry in folder.iterdir()
            if entry.name.endswith(".yaml")
        )
        for folder in folders
    }
    return {name: options for name, options in groups.items() if options}


def split_flags(arguments: Iterable[str]) -> tuple[list[str], list[str]]:
    """Take Hydra's flags, with their values, apart from ``key=value`` words.

    Raises:
        ValueError: for a flag that does not exist; ``--key=value`` is told to drop the dashes.
    """
    flags, words = [], []
    rest = iter(arguments)
    for argument in rest:
        if not argument.startswith("-") or argument == "-":
            words.append(argument)
            continue
        name, equals, _ = argument.partition("=")
        if name not in FLAGS:
            key = name.lstrip("-").replace("-", "_")
            raise ValueError(
                f"flag must be one that --help lists, got {name!r}; "
                f"did you mean {nearest(name, FLAGS)}, or the key {key}=...?"
            )
        flags.append(argument)
        if FLAGS[name] and not equals:
            flags += [value for value in (next(rest, None),) if value is not None]
    return flags, words


def prepare(arguments: Iterable[str], config: type) -> tuple[list[str], list[str]]:
    """Check the words after a command and make them safe for Hydra's grammar.

    Args:
        arguments: flags and ``key=value`` words, as the shell hands them over.
        config: the dataclass of the command.

    Returns:
        Flags, and words that Hydra reads as the user meant them.

    Raises:
        ValueError: for a word that is not ``key=value``, an unknown key or option (naming the
            nearest one), or a value that cannot be read.
    """
    flags, words = split_flags(arguments)
    is_sweep = "--multirun" in flags or "-m" in flags
    types = key_types(config)
    groups = {} if {"--config-dir", "-cd"} & set(flags) else group_options()
    return flags, [_prepare_word(word, types, groups, is_sweep) for word in words]


def quote(text: str, *, is_literal: bool) -> str:
    """A text as Hydra's grammar quotes it.

    Args:
        text: any characters.
        is_literal: whether ``${...}`` in it is text, not an interpolation.
    """
    if is_literal:
        text = re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", text)
    text = re.sub(r"(\\*)'", lambda match: match[1] * 2 + r"\'", text)
    return "'" + re.sub(r"\\+\Z", lambda match: match[0] * 2, text) + "'"


def _prepare_word(
    word: str, types: dict[str, object], groups: dict[str, list[str]], is_sweep: bool
) -> str:
    if word == "-" and "prompt_file" in types:
        return "prompt_file='-'"
    prefix, key, equals, value = _split(word)
    if key.startswith(("hydra.", "hydra/")):
        return word
    if not equals or prefix not in ("", "++"):
        raise ValueError(f"argument must be key=value, got {word!r}; see --help for the keys")
    if key not in types:
        raise ValueError(
            f"key must be one that --help lists, got {key!r}; did you mean {nearest(key, types)}?"
        )
    if key in groups:
        _check_options(key, value, groups[key], is_sweep)
        return word
    if any(name.startswith(f"{key}.") for name in types):
        raise ValueError(f"{key} must be set key by key, got {value!r}; write {key}.NAME=...")
    if _is_text(types[key]):
        value = _quote_text(key, value, is_sweep)
    elif types[key] == list[str]:
        value = _quote_texts(key, value)
    _check_value(key, value, is_sweep)
    return f"{prefix}{key}={value}"


def _split(word: str) -> tuple[str, str, str, str]:
    """Prefix of an override (``+``, ``++``, ``~`` or none), key, "=" if there is one, value."""
    match = re.fullmatch(r"(\+\+|\+|~|)([^=]*)(=?)(.*)", word, re.DOTALL)
    assert match is not None, "the pattern matches every text"
    prefix, key, equals, value = match.groups()
    return prefix, key, equals, value


def _is_text(kind: object) -> bool:
    return kind is str or set(typing.get_args(kind)) == {str, type(None)}


def _quote_text(key: str, value: str, is_sweep: bool) -> str:
    if key == LITERAL_KEY:
        if value == "???":  # a missing value, for OmegaConf, in quotes as well
            raise ValueError("prompt must be a text other than '???'; put it into a prompt_file")
        return quote(value, is_literal=True)
    is_list = is_sweep and "," in value
    if value == "null" or value.startswith(("'", '"')) or is_list:
        return value
    return quote(value, is_literal=False)


def _quote_texts(key: str, value: str) -> str:
    """A list of texts, or a single one, with each of them in quotes.

    ``stop=["\\n"]`` means a newline, and ``stop=[</s>,###]``, which the shell took the quotes off,
    what it says. What cannot be read as a list of texts stays as it is.
    """
    try:
        texts = OverridesParser.create().parse_override(f"{key}={value}").value()
    except HydraException:
        inner = re.fullmatch(r"\[([^][{}'\"\\]*)\]", value)
        texts = [text.strip() for text in inner[1].split(",")] if inner else None
    if key == ESCAPED_KEY and isinstance(texts, str):
        texts = [texts]
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        return value
    if key == ESCAPED_KEY:
        texts = [re.sub(r"\\[ntr\\]", lambda match: ESCAPES[match[0]], text) for text in texts]
    is_literal = key == ESCAPED_KEY
    return "[" + ",".join(quote(text, is_literal=is_literal) for text in texts) + "]"


def _check_options(key: str, value: str, options: list[str], is_sweep: bool) -> None:
    for option in value.split(",") if is_sweep else [value]:
        if option not in options:
            raise ValueError(
                f"{key} must be one of {', '.join(options)}, got {option!r}; "
                f"did you mean {nearest(option, options)}, or a key {key}.NAME=...?"
            )


def _check_value(key: str, value: str, is_sweep: bool) -> None:
    try:
        override = OverridesParser.create().parse_override(f"{key}={value}")
    except HydraException as error:
        raise ValueError(
            f"{key} must be a value that Hydra can read, got {value!r}; "
            f"put texts in quotes, and the whole in others: \"{key}=['a, b','c']\""
        ) from error
    if override.is_sweep_override() and not is_sweep:
        raise ValueError(
            f"{key} must be one value, got {value!r}; write [...] for a list, or add --multirun "
            "to run each"
        )
