"""Damage to files of a checkpoint: in their entries, their bytes or their place."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

NUMBERS = [0, 1, 2, 3, 7, 16, -1, 0.5, 1.5, 1e-30, 1e-400, 1e30, 1e308, float("nan"), float("inf")]
NUMBERS += [2**31, 2**32, 2**63, 2**64, 10**5, 10**9, 10**18, 10**30, 10**400, -(10**400)]
OTHERS = [None, True, False, "", "a", "\x1b[2J\n", "a" * 100_000, "\ud800", [], {}, [[]], [{}]]
OTHERS += [{"a": 1}, {"": None}, {"Regex": "(a+)+$"}, {"Regex": "("}, {"String": ""}, ["a"] * 1000]
MEANT = [
    *({"temperature": 0.7}, {"top_p": 0.9}, {"do_sample": True}, {"unk_token_id": 0}),
    *({"_model_name_or_path": "a/b"}, {"transformers_version": "5.0"}, {"use_cache": False}),
    *({"pad_token_id": 1}, {"novel": None}, {"mystery": {}}, {"eos_token_id": [2, 3]}),
    *({"bos_token": {"content": "<s>"}}, {"initializer_range": 0.3}, {"attention_dropout": 0.1}),
]
RAW = [
    *(b"", b"\n", b"null", b"[]", b'"a"', b"0", b"{}", b"{", b"\xff\xfe{}", b"\xef\xbb\xbf{}"),
    *(b"[" * 100_000, b'{"a":' * 100_000, b"{" + b" " * 5_000_000 + b"}", b"\x00" * 1000),
    *(b'{"a": 1, "a": 2}', b'{"a": NaN}', b'{"a": ' + b"9" * 5000 + b"}", b"[{}," * 200_000),
]
SNIPPETS = [
    *("{{ messages[0].content }}", "{{ bos_token }}", "{% for m in messages %}{{ m }}{% endfor %}"),
    *("{{ 'a' * 10**15 }}", "{{ 1 // 0 }}", "{{ 10 ** (10 ** 9) }}", "{{ 'a'|center(10**12) }}"),
    *("{% for a in range(9999) %}" * 3 + "{% endfor %}" * 3, "{% if 1 %}" * 120, "{{ x.y.z }}"),
    *("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{{ " + "(" * 5000, "{{ ''.__class__ }}"),
    *("{{ messages|tojson }}", "{% generation %}a{% endgeneration %}", "{% break %}", "\ud800"),
    *("{{ raise_exception('\\x1b[2J') }}", "{{ strftime_now('%d') }}", "{{ ''|nofilter }}"),
    *("{{ '%09999999999d' % 1 }}", "{% set s = namespace(a='aa') %}{{ s.a ~ s.a }}", "plain"),
]


def kinds(file: str) -> list[str]:
    """The ways in which a file of that name can be spoiled."""
    found = [*["meant"] * 4, "raw", "bytes", "cut", "place"]
    if file.endswith(".jinja") or file == "tokenizer_config.json":
        return [*found, "template", "template", "template"]
    if file.endswith(".safetensors"):
        return [*found, "header", "header", "header"]
    return [*found, "entry", "entry", "entry", "entry", "twice"]


def spoil(file: Path, kind: str, rng: random.Random) -> None:
    """Change a file, which is a link to the good one, or not there."""
    content = file.read_bytes() if file.exists() else b""
    file.unlink(missing_ok=True)
    if kind == "place":
        _replace(file, rng)
    elif kind == "raw":
        file.write_bytes(rng.choice(RAW))
    elif kind == "cut":
        file.write_bytes(content[: rng.randrange(len(content) + 1)])
    elif kind == "bytes":
        changed = bytearray(content or b"a")
        for _ in range(rng.choice([1, 1, 4, 100])):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        file.write_bytes(changed)
    elif kind == "header":
        file.write_bytes(_header(content, rng))
    elif kind == "template":
        file.write_bytes(_template(content, file.suffix == ".jinja", rng))
    else:
        file.write_bytes(_entries(content, kind, rng))


def _entries(content: bytes, kind: str, rng: random.Random) -> bytes:
    """JSON with another entry; what is no JSON stays as it is."""
    if not content.startswith(b"{"):
        return content
    entries = json.loads(content)
    if kind == "twice":
        again = json.dumps(rng.choice(list(entries)))
        return content.rstrip()[:-1] + f", {again}: {json.dumps(_value(rng))}}}".encode()
    if kind == "meant":
        entries |= rng.choice(MEANT)
        return json.dumps(entries, indent=rng.choice([None, 1, 8])).encode()
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        place, key = _place(entries, rng)
        change = rng.random()
        if change < 0.1 and key is not None:
            del place[key]
        elif change < 0.2 and isinstance(place, dict):
            place[rng.choice(["novel", "\x1b[31m", "rope_scaling", "quantization_config"])] = (
                _value(rng)
            )
        elif key is not None:
            place[key] = _value(rng)
    return json.dumps(entries).encode()


def _place(entries: Any, rng: random.Random) -> tuple[Any, Any]:
    """A nested object or list, and a key in it."""
    place = entries
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            return place, None
        key = rng.choice(keys)
        if not isinstance(place[key], dict | list) or rng.random() < 0.3:
            return place, key
        place = place[key]


def _value(rng: random.Random) -> Any:
    return rng.choice(rng.choice([NUMBERS, NUMBERS, OTHERS]))


def _header(content: bytes, rng: random.Random) -> bytes:
    """A safetensors file with another header over the same bytes."""
    length = int.from_bytes(content[:8], "little")
    if not 0 < length < len(content):
        return content
    header, data = content[8 : 8 + length], content[8 + length :]
    choice = rng.randrange(4)
    if choice == 0:
        return rng.choice([0, 1, length + 8, 2**31, 2**63]).to_bytes(8, "little") + content[8:]
    if choice == 1:
        header = _entries(header.strip(), rng.choice(["entry", "twice"]), rng)
    elif choice == 2:
        names = [name for name in json.loads(header) if name != "__metadata__"]
        other = rng.choice(["\x1b[2J", rng.choice(names), "lm_head.weight", "a" * 9999])
        header = header.replace(
            json.dumps(rng.choice(names)).encode(), json.dumps(other).encode(), 1
        )
    else:
        header = header.replace(b"F32", rng.choice([b"I32", b"F16", b"F64", b"F33", b"U32"]))
    return len(header).to_bytes(8, "little") + header + data


def _template(content: bytes, is_file: bool, rng: random.Random) -> bytes:
    text = "".join(rng.choices(SNIPPETS, k=rng.choice([1, 1, 2, 3])))
    if is_file:
        return text.encode(errors="replace")
    entries = json.loads(content)
    listed = [{"name": "default", "template": text}, {"name": "tool_use", "template": "x"}]
    entries["chat_template"] = rng.choice([text, text, listed, listed[0], [text], 3])
    return json.dumps(entries).encode()


def _replace(file: Path, rng: random.Random) -> None:
    """Something else than a file, or nothing."""
    choice = rng.randrange(6)
    if choice == 0:
        file.mkdir()
    elif choice == 1:
        os.mkfifo(file)
    elif choice == 2:
        file.symlink_to("nowhere")
    elif choice == 3:
        file.symlink_to(file)
    elif choice == 4:
        file.symlink_to("/dev/zero")
