"""A chat template has bounds on time, memory and output, and whatever it does is a ValueError."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from mnemosyne.serve import rendering
from mnemosyne.serve.chat import ChatTemplate

HELLO = [{"role": "user", "content": "hello"}]
ECHO = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


def template(source: str) -> ChatTemplate:
    return ChatTemplate({"default": source}, {})


def refusal(source: str, messages: Any = HELLO) -> str:
    chat = template(source)
    with pytest.raises(ValueError, match=r"^messages must .*got.*; ") as caught:
        chat.render(messages)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600
    return str(caught.value)


def worker_of(chat: ChatTemplate) -> subprocess.Popen[bytes]:
    process = chat._renderer._process
    assert process is not None
    return process


@pytest.mark.parametrize(
    "source",
    [
        "{{ 1 // 0 }}",
        "{{ 10.0 ** 400 }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% for a in [1] %}" * 25 + "{% endfor %}" * 25,
        "{% if 1 %}" * 120 + "{% endif %}" * 120,
        "{{ " + "[" * 150 + "]" * 150 + " }}",
        "{{ " + "(" * 100_000,
        "{% break %}",
        "{{ [1]|slice(0)|list }}",
        "{{ 'abc'|truncate(1) }}",
        "{{ 1|nofilter }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ raise_exception('\\x1b[2J' ~ 'a' * 9999) }}",
        "{{ strftime_now(3) }}",
        "{% include 'x' %}",
    ],
    ids=lambda source: source[:30],
)
def test_whatever_a_template_raises_is_a_sentence(source: str) -> None:
    assert "must fit the model's chat template" in refusal(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 10**15 }}",
        "{{ 'a'|center(10**12) }}",
        "{{ '%0999999999999d' % 1 }}",
        "{{ '{:>9999999999}'.format('a') }}",
        "{{ 'a'.ljust(10**11) }}",
        "{% set ns = namespace(s='aa') %}{% for i in range(99) %}"
        "{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
        "{{ ['a' * 10**6] * 10**6 }}",
    ],
)
def test_memory_is_bounded(source: str) -> None:
    said = refusal(source)

    assert "MiB of memory" in said or "Error" in said


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(9999) %}" * 4 + "{% endfor %}" * 4,
        "{{ 10 ** (10 ** 9) }}",
        "{% set s = messages[0].role * 10**7 %}"
        "{% for a in range(99999) %}{{ 'ab' in s }}{% endfor %}",
    ],
)
def test_time_is_bounded(monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    monkeypatch.setattr(rendering, "PROCESSOR_S", 1)

    assert "more than 1 s of processor time" in refusal(source)


def test_output_is_bounded() -> None:
    loop = "{% for a in range(9999) %}{{ 'a' * 999 }}{% endfor %}"

    assert "9,989,001 characters, more than 4," in refusal(loop)


def test_bounds_grow_with_the_messages() -> None:
    long = [{"role": "user", "content": "a" * 6_000_000}]

    assert template(ECHO).render(long) == "<user>" + "a" * 6_000_000


def test_a_template_that_met_a_bound_leaves_the_next_rendering_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rendering, "PROCESSOR_S", 1)
    chat = template("{% if huge %}{{ 10 ** huge }}{% endif %}" + ECHO)

    assert chat.render(HELLO) == "<user>hello"
    with pytest.raises(ValueError, match="processor time"):
        chat.render(HELLO, variables={"huge": 10**9})
    assert chat.render(HELLO) == "<user>hello"


def test_a_process_that_is_killed_is_replaced() -> None:
    chat = template(ECHO)
    chat.render(HELLO)

    worker_of(chat).send_signal(signal.SIGKILL)
    worker_of(chat).wait()

    assert chat.render(HELLO) == "<user>hello"


def test_processes_that_ended_leave_no_descriptors() -> None:
    chat = template(ECHO)
    chat.render(HELLO)
    before = len(os.listdir("/proc/self/fd"))

    for _ in range(3):
        worker_of(chat).kill()
        worker_of(chat).wait()
        chat.render(HELLO)

    assert len(os.listdir("/proc/self/fd")) == before


def test_threads_get_their_own_texts() -> None:
    chat = template(ECHO)

    def render(index: int) -> str:
        return chat.render([{"role": "user", "content": f"{index} " * 100}])

    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(render, range(200)))

    assert texts == [f"<user>{f'{index} ' * 100}" for index in range(200)]


def test_a_fork_has_a_process_of_its_own() -> None:
    code = (
        "import os\n"
        "from mnemosyne.serve.chat import ChatTemplate\n"
        f"chat = ChatTemplate({{'default': {ECHO!r}}}, {{}})\n"
        f"texts = [chat.render({HELLO!r})]\n"
        "child = os.fork()\n"
        f"text = chat.render({HELLO!r})\n"
        "if child:\n"
        "    assert os.waitpid(child, 0)[1] == 0\n"
        f"    text = chat.render({HELLO!r})\n"
        "assert text == '<user>hello', text\n"
    )

    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_process_ends_with_its_template() -> None:
    chat = template(ECHO)
    chat.render(HELLO)
    process = worker_of(chat)

    del chat

    assert process.returncode == 0
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)


@pytest.mark.parametrize(
    "messages",
    [object(), [{"content": b"a"}], float, [{"content": {1, 2}}], [{("a",): 1}]],
    ids=["an object", "bytes", "a type", "a set", "a key"],
)
def test_messages_that_are_no_json_are_refused(messages: Any) -> None:
    assert "must be plain JSON data" in refusal(ECHO, messages)


def test_messages_that_are_too_deep_are_refused() -> None:
    deep: Any = "x"
    for _ in range(100_000):
        deep = [deep]

    assert "must be plain JSON data" in refusal(ECHO, [{"content": deep}])
    del deep


def test_foreign_text_comes_through_unchanged() -> None:
    content = "naïve 👩‍👩‍👧 \x1b[0m \u2028 \r\n\t \x00 \ud800"

    assert template(ECHO).render([{"role": "user", "content": content}]) == f"<user>{content}"
