"""Which room of the package may import what, and a reader of sources that finds breaches."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "mnemosyne"
BANNED = ("kernels", "model_zoo", "conf", "tests", "tools")  # bare names, see TID251 as well
DYNAMIC_IMPORTS = ("importlib.import_module", "import_module", "__import__")


@dataclass(frozen=True, slots=True)
class Rule:
    """Imports that one room may have besides the standard library and itself."""

    rooms: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    itself: bool = True  # whether files of the room may import one another


@dataclass(frozen=True, slots=True)
class Breach:
    """One import that its room's rule does not allow."""

    path: Path
    line: int
    target: str
    room: str
    rule: Rule

    def __str__(self) -> str:
        allowed = ", ".join((*self.rule.rooms, *self.rule.packages)) or "nothing"
        return (
            f"{self.path}:{self.line}: imports {self.target}; "
            f"{self.room or PACKAGE} may import {allowed} (and the standard library)"
        )


_PAGELESS_CACHE = tuple(
    f"cache.{name}"
    for name in (
        *("allocator", "chain", "kinds", "layout", "ledger", "prefix", "room", "stock", "table"),
        "windows",
        *("leaf_file", "leaf_folder", "leaf_storage"),
    )
)
_PAGELESS = Rule(("config", *_PAGELESS_CACHE), ("numpy",), itself=False)
_DEMO = Rule(
    (
        *("cli", "llm", "request", "config_generate", "metrics", "plot", "model_zoo.haystack"),
        "process",
    ),
    ("rich",),
)
_SIMULATED = Rule(
    (
        *("cli", "joining.simulated", "simulate", "config", "config_simulate", "metrics", "plot"),
        *("process", "shape"),
    ),
    ("rich",),
)
_CORE = ("torch", "numpy", "safetensors", "tokenizers", "jinja2")

# The longest name that a module falls under decides. `config` is free of torch and knows no room,
# so every room but the kernels may take its own small dataclasses from there.
TABLE = {
    # the package itself: the public names
    "": Rule(("llm", "request", "config", "serve")),
    "options": Rule(("config",)),
    "llm": Rule(
        (
            *("options", "session", "joining.checkpoint", "config", "metrics", "request", "serve"),
            "schedule.predictor",
        ),
    ),
    "session": Rule(
        (
            *("joining", "config", "metrics", "request", "serve"),
            *("parallel.keys", "parallel.trace", "runtime.leaves"),
            *("schedule.foreign_predictor", "schedule.predictor"),
        ),
    ),
    "__main__": Rule(("cli", "process")),
    "process": Rule(),
    # what the process runs on; every room but the kernels may ask
    "machine": Rule(),
    "memory_limits": Rule(),
    "kept": Rule(("machine",)),
    "hub": Rule(),
    "cli": Rule(
        (
            *("joining.rank", "llm", "request", "serve.progress", "serve.prompts"),
            *("config", "config_bench", "config_client", "config_generate", "config_serve"),
            *("config_simulate", "parallel.launch", "parallel.start", "joining.simulated"),
            "process",
        ),
        ("hydra", "omegaconf", "rich"),
    ),
    "cli.shapes": Rule((*_SIMULATED.rooms, "model_zoo.spec"), ("omegaconf",)),
    "cli.simulate": _SIMULATED,
    "cli.plan": _SIMULATED,
    "cli.demo": _DEMO,
    "cli.demo_view": _DEMO,
    "cli.drain": Rule(("config_serve", "process")),
    "cli.front": Rule(("config_serve", "process", "server")),
    "cli.chat": Rule(
        (
            *("cli", "client", "config_client", "llm", "process", "request", "serve.progress"),
            "serve.prompts",
        ),
        ("rich",),
    ),
    "cli.bench_serve": Rule(("cli", "config_client", "load", "process"), ("rich",)),
    "client": Rule(),
    # load for servers of any make
    "load": Rule(("client", "config_client", "metrics"), ("numpy",)),
    "load.picture": Rule(("load",), ("matplotlib", "numpy"), itself=False),
    "cli.serve": Rule(("cli", "config_serve", "llm", "process", "server")),
    "cli.bench": Rule(
        ("bench", "joining.checkpoint", "config", "config_bench", "machine"), ("rich",)
    ),
    # `mnemosyne bench`: the engines run in processes of their own
    "bench": Rule(("config_bench", "machine"), ("numpy", "rich")),
    "bench.picture": Rule(("bench.compare", "bench.report"), ("matplotlib",), itself=False),
    "bench.gguf_file": Rule(
        ("files", "kept", "machine", "model_zoo", "runtime.headers"),
        ("gguf", "numpy", "torch"),
        itself=False,
    ),
    # programs for other interpreters, which have none of our rooms
    "bench.peers": Rule((), ("numpy", "torch"), itself=False),
    "bench.peers.with_transformers": Rule((), ("torch", "transformers"), itself=False),
    "bench.peers.with_vllm": Rule((), ("vllm",), itself=False),
    "bench.peers.with_llamacpp": Rule((), ("numpy", "llama_cpp"), itself=False),
    "bench.peers.ours": Rule(
        (
            *("joining", "cache.pages", "config", "metrics", "request", "runtime"),
            *("schedule", "serve"),
        ),
        ("numpy", "torch"),
        itself=False,
    ),
    # the one room that knows all others; each file of it knows few
    "joining": Rule(),
    "joining.device": Rule((), ("torch",)),
    "joining.checkpoint": Rule(
        (
            *("files", "hub", "kept", "machine", "model_zoo", "operators", "parallel", "runtime"),
            "serve",
        ),
        ("torch",),
    ),
    "joining.compute": Rule(
        (
            *("attention", "cache.pages", "config", "operators", "runtime", "schedule.plan"),
            "shape",
        ),
        ("torch",),
    ),
    "joining.fingerprint": Rule(
        ("joining.checkpoint", "kept", "machine", "model_zoo"), ("torch",), itself=False
    ),
    "joining.leaves": Rule(
        (
            *("joining.checkpoint", "joining.compute", "joining.fingerprint", "cache", "config"),
            *("files", "machine", "model_zoo", "parallel", "runtime"),
        )
    ),
    "joining.roofline": Rule(("config", "shape"), ("torch",)),
    "joining.step_times": Rule(("machine", "schedule"), ("numpy", "torch")),
    "joining.rank": Rule(
        (
            *("joining.checkpoint", "joining.compute", "joining.device", "joining.leaves"),
            *("config", "metrics", "attention.kvp"),
            *("cache", "kernels", "model_zoo", "parallel", "runtime", "serve", "shape"),
        ),
        ("torch",),
    ),
    # the one door, of every executor; the two after it are of real and of simulated ones
    "joining.engine": Rule(("cache", "config", "metrics", "schedule", "serve", "shape")),
    "joining.real": Rule(("joining", "config", "metrics", "runtime", "schedule", "serve")),
    "joining.crew": Rule(("joining.rank", "parallel", "request", "runtime", "serve"), ("torch",)),
    # without a model; the cuts of one and the rules of a mesh are those of a real one
    "joining.simulated": Rule(
        (
            *("cache", "config", "config_simulate", "metrics", "request", "schedule", "serve"),
            *("joining.engine", "shape", "simulate", "model_zoo.stages", "parallel.mesh"),
        )
    ),
    "plot": Rule(("metrics",), ("matplotlib", "numpy")),
    "config": Rule(),
    "shape": Rule(("config",)),
    "files": Rule(),
    "version": Rule(),
    "config_bench": Rule(("config",)),
    "config_generate": Rule(("config",)),
    "config_client": Rule(("config",)),
    "config_serve": Rule(("config",)),
    "config_simulate": Rule(("config",)),
    "plain": Rule((), ("numpy",)),
    "request": Rule(("config", "plain"), ("numpy",)),
    "metrics": Rule(("config",), ("numpy",)),
    "schedule": Rule(("request", "config", *_PAGELESS_CACHE, "kept", "machine"), ("numpy",)),
    "simulate": Rule(
        (
            *("schedule", "metrics", "config", "config_simulate", "request", "shape"),
            *_PAGELESS_CACHE,
        ),
        ("numpy",),
    ),
    "cache": _PAGELESS,
    "cache.pages": Rule(
        ("config", "kernels", "memory_limits", "cache.kinds", "cache.layout", "cache.page_ids"),
        ("torch", "numpy"),
    ),
    "cache.leaf_copies": Rule(
        ("cache.layout", "cache.leaf_file", "cache.pages"), ("torch", "numpy"), itself=False
    ),
    "cache.page_ids": Rule(("cache.layout",), ("torch", "numpy"), itself=False),
    "cache.capacity": Rule(
        ("config", "cache.kinds", "cache.pages", "cache.layout", "cache.room"), ("torch",)
    ),
    "kernels": Rule((), ("torch", "triton")),
    "parallel": Rule(
        ("config", "kernels", "machine", "process", "shape"), ("torch", "numpy", "msgspec")
    ),
    # plans travel, and they are free of torch
    "parallel.codec": Rule(
        ("schedule.plan", "request", "cache.table"), ("msgspec", "numpy"), itself=False
    ),
    "parallel.control": Rule(
        ("parallel.address", "parallel.codec", "parallel.keys", "schedule.plan", "request"),
        ("zmq",),
        itself=False,
    ),
    "operators": Rule(("config", "kernels"), ("torch",)),
    # what the runtime hands to the layers of a model; each knows the other by this alone
    "step_context": Rule(("attention.segments", "parallel.feed_forward")),
    "attention": Rule(("cache", "kernels", "parallel", "config"), ("torch", "numpy")),
    "model_zoo": Rule(
        ("attention", "operators", "parallel", "config", "files", "shape", "step_context"),
        ("torch", "numpy", "safetensors", "tokenizers"),
    ),
    # the reader of its file is an extra
    "model_zoo.smollm2": Rule(("model_zoo.fetch",), ("torch", "numpy", "gguf"), itself=False),
    "runtime": Rule(
        (
            *("request", "schedule.plan", "cache", "attention", "parallel", "config", "files"),
            *("kernels.cpu", "machine", "operators", "step_context"),
        ),
        ("torch", "numpy", "safetensors"),
    ),
    "serve": Rule(
        ("schedule", "runtime", "request", "metrics", "config", "files", "plain"),
        ("torch", "numpy", "tokenizers", "jinja2", "rich", "zmq", "msgspec"),
    ),
    # HTTP over an engine in this process or another one: the extra `serve`
    "server": Rule(
        (
            *("config", "config_serve", "files", "plain", "process", "request", "metrics"),
            *("serve", "version"),
        ),
        (
            *("numpy", "msgspec", "tokenizers", "fastapi", "starlette", "uvicorn"),
            *("prometheus_client", "zmq"),
        ),
    ),
    # an engine is stuck when its watchdog would say so
    "server.embedded": Rule(
        (
            *("metrics", "parallel.watchdog", "request", "serve", "server.backend"),
            *("server.totals", "version"),
        ),
        itself=False,
    ),
    # the process model: the front starts ranks, and asks the kernel who is at the other end
    "server.link": Rule(("parallel.keys",), (), itself=False),
    "server.sources": Rule(("parallel.keys", "parallel.launch", "server.link"), (), itself=False),
    "conf": Rule(),
}


def is_under(name: str, room: str) -> bool:
    """Tell if the dotted ``name`` is ``room`` or stands in it."""
    return name == room or name.startswith(room + ".")


def find_breaches(package: Path) -> list[Breach]:
    """Every import in a package that ``TABLE`` does not allow.

    Args:
        package: the folder of the package; symlinked rooms in it are followed.

    Returns:
        Breaches in the order of files and lines.
    """
    modules = {_module_name(path, package): path for path in _sources(package)}
    breaches = []
    for module, path in modules.items():
        room = max((room for room in TABLE if room == "" or is_under(module, room)), key=len)
        if room == "" and module:
            raise AssertionError(f"{path}: no rule for {module}; add its room to the import table")
        for line, target in imports_of(path, module, set(modules)):
            if not _is_allowed(target, room, TABLE[room]):
                breaches.append(Breach(path, line, target, room, TABLE[room]))
    return breaches


def imports_of(path: Path, module: str, modules: set[str]) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted target of every import, nested and type-only ones included.

    Args:
        path: a source file.
        module: its name inside the package, "" for the package itself.
        modules: names of all modules of the package, which tell a module from a name in one.
    """
    base = f"{PACKAGE}.{module}".rstrip(".").split(".")
    if path.name != "__init__.py":
        base = base[:-1]  # the package that the dots of a relative import start from
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = base[: len(base) - node.level + 1] if node.level else []
            source = ".".join([*parents, *((node.module,) if node.module else ())])
            for alias in node.names:
                full = f"{source}.{alias.name}"
                is_module = full.removeprefix(PACKAGE + ".") in modules
                yield node.lineno, full if is_module else source
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in DYNAMIC_IMPORTS:
            yield from ((node.lineno, arg.value) for arg in node.args[:1] if is_text(arg))


def is_text(node: ast.expr) -> bool:
    """Tell if an argument is a literal string."""
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _sources(package: Path) -> Iterator[Path]:
    for path in sorted(package.iterdir()):
        if path.is_dir():
            yield from _sources(path)
        elif path.suffix == ".py":
            yield path


def _module_name(path: Path, package: Path) -> str:
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _is_allowed(target: str, room: str, rule: Rule) -> bool:
    top = target.partition(".")[0]
    if top != PACKAGE:
        return top not in BANNED and (top in sys.stdlib_module_names or top in rule.packages)
    inside = target.removeprefix(PACKAGE).lstrip(".")
    if rule.itself and room and is_under(inside, room):
        return True
    return any(is_under(inside, allowed) for allowed in rule.rooms)
