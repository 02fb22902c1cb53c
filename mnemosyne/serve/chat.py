"""Chat templates: messages to prompt text, as the template that came with the model says."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mnemosyne.files import is_there, printable, read_object, read_text, shown
from mnemosyne.serve.rendering import Renderer, RenderError

Message = Mapping[str, Any]  # role, content and any other field that the template reads


class ChatTemplate:
    """The chat templates of a checkpoint, by name.

    Args:
        sources: Jinja templates; the one named "tool_use" serves requests with tools.
        variables: special tokens that templates may name, such as ``bos_token``.
    """

    def __init__(self, sources: Mapping[str, str], variables: Mapping[str, str]) -> None:
        self._sources = dict(sources)
        self._variables = dict(variables)
        self._renderer = Renderer(sources)

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
        return cls(sources, special_tokens(path)) if sources else None

    def save(self, folder: Path) -> None:
        """Write the files that ``from_dir`` reads."""
        named = [{"name": name, "template": text} for name, text in self._sources.items()]
        config = {**self._variables, "chat_template": named}
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")

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
        names = self._variables | {"add_generation_prompt": add_generation_prompt}
        given = {"messages": messages, "tools": tools, "documents": None, **names}
        # As JSON it reaches another process, where a template meets no method of foreign objects.
        try:
            request = json.dumps(given | dict(variables or {}))
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                f"messages must be plain JSON data, got {printable(error)}; convert them"
            ) from error
        try:
            return self._renderer.render(self._name(tools), request)
        except RenderError as error:
            raise ValueError(
                f"messages must fit the model's chat template, got: {printable(error)}; change "
                "them or send a plain prompt"
            ) from error

    def _name(self, tools: object) -> str:
        name = "tool_use" if tools is not None and "tool_use" in self._sources else "default"
        if name not in self._sources:
            known = ", ".join(printable(name) for name in self._sources)
            raise ValueError(
                f"chat_template must hold one that is named default, got {known}; name one so"
            )
        return name


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


def special_tokens(path: Path | str) -> dict[str, str]:
    """Texts of the special tokens that a Hugging Face directory names, such as ``bos_token``.

    An entry is a string or an object with ``content``; those of tokenizer_config.json come before
    those of special_tokens_map.json.
    """
    less, more = (
        _strings(read_object(Path(path) / name))
        for name in ("special_tokens_map.json", "tokenizer_config.json")
    )
    return less | more


def _strings(entries: Mapping[str, Any]) -> dict[str, str]:
    tokens = {
        name: value.get("content") if isinstance(value, dict) else value
        for name, value in entries.items()
        if name.endswith("_token")
    }
    return {name: token for name, token in tokens.items() if isinstance(token, str)}
