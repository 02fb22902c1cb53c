"""Renders chat templates; a program of its own, whose time and memory the system bounds.

The first line of input holds templates by name, each later one a request; every request is
answered in a line. A template that takes more processor time than it may ends the process.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class GenerationTag(Extension):
    """``{% generation %}`` marks the text of an assistant, for training; here its body is shown."""

    tags = {"generation"}  # noqa: RUF012  # the type that jinja2 declares

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Templates:
    """Templates by name, compiled on first use.

    Args:
        sources: Jinja text by name.
    """

    def __init__(self, sources: dict[str, str]) -> None:
        self._sources = sources
        self._compiled: dict[str, jinja2.Template] = {}
        self._environment = environment()

    def render(self, name: str, names: dict[str, Any]) -> str:
        if name not in self._compiled:
            self._compiled[name] = self._environment.from_string(self._sources[name])
        return self._compiled[name].render(names)


def environment() -> ImmutableSandboxedEnvironment:
    """The names and switches that templates of Hugging Face models are written for."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
    )
    made.filters["tojson"] = to_json
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return made


def to_json(
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


def raise_exception(message: str) -> NoReturn:
    """Refuse messages, as a template may."""
    raise jinja2.TemplateError(message)


def answer(templates: Templates, line: bytes, limits: dict[str, int]) -> dict[str, str]:
    """The rendered ``text``, or the ``error`` that says why there is none."""
    try:
        text = templates.render(*json.loads(line))
    except MemoryError:
        return {"error": f"more than {limits['memory_bytes'] >> 20} MiB of memory"}
    except Exception as error:  # noqa: BLE001  # a template may raise anything
        kind = "" if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: "
        return {"error": f"{kind}{str(error)[:1000]}"}
    if len(text) > limits["max_chars"]:
        return {"error": f"{len(text):,} characters, more than {limits['max_chars']:,}"}
    return {"text": text}


def main() -> None:
    templates = Templates(json.loads(sys.stdin.buffer.readline()))
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    own_bytes = pages * resource.getpagesize()
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # which ends the process
    for line in sys.stdin.buffer:
        limits, _, request = line.partition(b"\t")
        bounds: dict[str, int] = json.loads(limits)
        room = own_bytes + bounds["memory_bytes"]
        resource.setrlimit(resource.RLIMIT_AS, (room if most < 0 else min(room, most), most))
        signal.setitimer(signal.ITIMER_PROF, bounds["processor_s"])
        said = json.dumps(answer(templates, request, bounds))
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(said + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
