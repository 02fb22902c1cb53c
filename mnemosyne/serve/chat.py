"""Chat templates: messages to prompt text, as the template that came with the model says."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mnemosyne.files import is_there, printable, read_object, read_text, shown

Message = Mapping[str, Any]  # role, content and whatever else the template reads


class ChatTemplate:
    """The chat templates of a checkpoint, by name.

    Args:
        sources: Jinja templates; the one named "tool_use" serves requests with tools.
        variables: special tokens that templates may name, such as ``bos_token``.
    """

    def __init__(self, sources: Mapping[str, str], variables: Mapping[str, str]) -> None:
        self._sources = dict(sources)
        self._variables = dict(variables)
        self._compiled: dict[str, jinja2.Template] = {}

    @classmethod
    def from_dir(cls, path: Path | str) -> ChatTemplate | None:
        """Read the templates of a Hugging Face directory; None if it has none.

        Files (chat_template.jinja, additional_chat_templates/NAME.jinja) come before the
        ``chat_template`` of tokenizer_config.json.

        Raises:
            ValueError: if tokenizer_config.json or its ``chat_template`` is malformed.
        """
        path = Path(path)
        config = read_object(path / "tokenizer_config.json")
        files = {file.stem: file for file in path.glob("additional_chat_templates/*.jinja")}
        if is_there(path / "chat_template.jinja"):
            files["default"] = path / "chat_template.jinja"
        sources = {name: read_text(file) for name, file in files.items() if is_there(file)}
        if not sources:
            sources = _named(config.get("chat_template"), path / "tokenizer_config.json")
        variables = _special_tokens(read_object(path / "special_tokens_map.json"))
        return cls(sources, variables | _special_tokens(config)) if sources else None

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Messages to text.

        Args:
            messages: dicts with ``role`` and ``content``, oldest first; plain JSON data.
            add_generation_prompt: end with the header of an assistant's message.
            tools: JSON schemas of functions.
            variables: further names the template reads, such as ``enable_thinking``.

        Returns:
            The prompt; special tokens are in it, so encode it without adding them.

        Raises:
            ValueError: if the messages are no JSON data or the template refuses them.
        """
        # The copy is made of plain types, so that a template meets no method of foreign objects.
        try:
            plain = json.loads(json.dumps([messages, tools, dict(variables or {})]))
        except (TypeError, ValueError) as error:
            raise ValueError(f"messages must be plain JSON data, got {error}; convert them") from (
                error
            )
        names = {"messages": plain[0], "tools": plain[1], "documents": None} | self._variables
        names |= {"add_generation_prompt": add_generation_prompt} | plain[2]
        try:
            return self._template("tool_use" if tools is not None else "default").render(names)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise ValueError(
                f"messages must fit the model's chat template, got: {error}; change them or send "
                "a plain prompt"
            ) from error

    def _template(self, name: str) -> jinja2.Template:
        if name not in self._sources:
            name = "default"
        if name not in self._sources:
            raise ValueError(f"no template is named default, only {', '.join(self._sources)}")
        if name not in self._compiled:
            self._compiled[name] = _environment().from_string(self._sources[name])
        return self._compiled[name]


class _GenerationTag(Extension):
    """``{% generation %}`` marks what an assistant wrote, for training; here its body is shown."""

    tags = {"generation"}  # noqa: RUF012  # the type that jinja2 declares

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    """The names and switches that templates of Hugging Face models are written for."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is; Jinja's own filter would escape it for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _named(value: object, file: Path) -> dict[str, str]:
    """``chat_template`` is a template, or a list of templates with names."""
    if value is None:
        return {}
    entries = [{"name": "default", "template": value}] if isinstance(value, str) else value
    try:
        named = {entry["name"]: entry["template"] for entry in entries}  # type: ignore[attr-defined]
    except (KeyError, TypeError):
        named = {"": None}
    if not all(isinstance(text, str) for text in (*named, *named.values())):
        raise ValueError(
            f"chat_template in {printable(file)} must be a string or a list of objects with name "
            f"and template, got {shown(value)}; correct the file"
        )
    return named


def _special_tokens(entries: Mapping[str, Any]) -> dict[str, str]:
    """Entries such as ``bos_token``, written as a string or as an object with ``content``."""
    tokens = {
        name: value.get("content") if isinstance(value, dict) else value
        for name, value in entries.items()
        if name.endswith("_token")
    }
    return {name: token for name, token in tokens.items() if isinstance(token, str)}
