"""Text to ids and back, and chat templates, as transformers does them."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import processors
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from mnemosyne.serve.tokenizer import Tokenizer
from tests.serve.made_tokenizers import BEGIN, END, TEXTS, byte_fallback_bpe, byte_level_bpe

LLAMA_STYLE = """\
{{- bos_token }}
{%- if custom_tools is defined %}{%- set tools = custom_tools %}{%- endif %}
{%- if not date_string is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|header|>system<|/header|>\\n\\nToday: " + date_string + "\\n" }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message + eos_token }}
{%- for message in messages %}
    {%- if message.role not in ['user', 'assistant', 'tool'] %}
        {{- raise_exception("Unknown role: " + message.role) }}
    {%- endif %}
    {%- if 'tool_calls' in message %}
        {%- if message.tool_calls | length != 1 %}
            {{- raise_exception("Only one call at a time!") }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|header|>assistant<|/header|>\\n\\n{"name": "' + call.name + '", ' }}
        {{- '"parameters": ' + (call.arguments | tojson) + "}" + eos_token }}
    {%- else %}
        {{- '<|header|>' + message['role'] + '<|/header|>\\n\\n' }}
        {%- generation %}{{- message['content'] | trim + eos_token }}{%- endgeneration %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|header|>assistant<|/header|>\\n\\n' }}{%- endif %}
"""

QWEN_STYLE = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- "# Tools\\n<tools>" }}
    {%- for tool in tools %}{{- "\\n" + tool | tojson }}{%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step and message.role == "user" and message.content is string %}
        {%- set ns.multi_step = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "system" %}{%- continue %}{%- endif %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "assistant" and '</think>' in content %}
        {%- if loop.index0 < ns.last %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content }}
    {%- for tool_call in message.tool_calls or [] %}
        {{- '\\n<tool_call>\\n{"name": "' + tool_call.function.name + '", "arguments": ' }}
        {{- tool_call.function.arguments | tojson }}
        {{- '}\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Wetter <heute> & morgen, für 'Köln'",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
CALL = {"function": {"name": "weather", "arguments": {"city": "Köln", "days": 2}}}
CHATS = [
    [{"role": "user", "content": "  Hello <b>world</b>  "}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Grüße 👋"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nhello"},
        {"role": "user", "content": "and again"},
    ],
    [
        {"role": "user", "content": "What is the weather?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "rain"},
    ],
]


def write_checkpoint(path: Path, template: object = None, **entries: object) -> Path:
    """A directory with a tokenizer and this ``chat_template``."""
    path.mkdir(exist_ok=True)
    byte_level_bpe().save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BEGIN, "eos_token": END}
    config |= {"chat_template": template} if template is not None else {}
    (path / "tokenizer_config.json").write_text(json.dumps(config | entries))
    return path


def load(path: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_dir(path)
    assert tokenizer is not None
    return tokenizer


@pytest.mark.parametrize("text", [*TEXTS, "", " ", "\n\n\t a  b", "<s>inside</s>"])
def test_ids_and_text_are_those_of_transformers(tmp_path: Path, text: str) -> None:
    path = write_checkpoint(tmp_path)
    tokenizer, oracle = load(path), PreTrainedTokenizerFast.from_pretrained(path)

    ids = tokenizer.encode(text)
    plain = tokenizer.encode(text, add_special_tokens=False)

    assert ids.dtype == np.int64
    begin = BEGIN if not text.startswith(BEGIN) else ""
    assert ids.tolist() == oracle.encode(begin + text, add_special_tokens=False)
    assert plain.tolist() == oracle.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == oracle.decode(ids, skip_special_tokens=True)
    assert tokenizer.decode(ids, skip_special_tokens=False) == oracle.decode(ids)


def test_a_truncation_left_in_the_file_does_not_cut_prompts(tmp_path: Path) -> None:
    backend = byte_level_bpe()
    backend.enable_truncation(4)
    backend.enable_padding(length=32)
    backend.save(str(tmp_path / "tokenizer.json"))

    ids = load(tmp_path).encode("the cat sat on the mat " * 20)

    assert load(tmp_path).decode(ids) == "the cat sat on the mat " * 20


def test_without_a_tokenizer_file_there_is_no_tokenizer(tmp_path: Path) -> None:
    assert Tokenizer.from_dir(tmp_path) is None


def test_a_broken_tokenizer_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"version": ')

    with pytest.raises(ValueError, match=r"tokenizer\.json must be a tokenizer"):
        Tokenizer.from_dir(tmp_path)


def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(ValueError, match="prompt must be valid Unicode"):
        Tokenizer(byte_level_bpe()).encode("half \ud83d")


def test_special_and_unknown_ids_are_no_text() -> None:
    backend = byte_fallback_bpe()
    tokenizer = Tokenizer(backend)

    assert not tokenizer.is_text(backend.token_to_id(END))
    assert tokenizer.is_text(backend.token_to_id(END), skip_special_tokens=False)
    assert tokenizer.is_text(backend.token_to_id("ab"))
    assert not tokenizer.is_text(10_000)
    assert tokenizer.decode([backend.token_to_id("ab"), 10_000]) == "ab"


@pytest.mark.parametrize("template", [LLAMA_STYLE, QWEN_STYLE], ids=["llama", "qwen"])
@pytest.mark.parametrize("messages", CHATS, ids=["user", "system", "tool"])
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["plain", "tools"])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_chats_are_rendered_as_by_transformers(
    tmp_path: Path,
    template: str,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
    add_generation_prompt: bool,
) -> None:
    path = write_checkpoint(tmp_path, template)
    oracle = PreTrainedTokenizerFast.from_pretrained(path)

    text = load(path).apply_chat_template(
        messages, tools=tools, add_generation_prompt=add_generation_prompt
    )

    assert text == oracle.apply_chat_template(
        messages, tools=tools, add_generation_prompt=add_generation_prompt, tokenize=False
    )


def test_further_variables_reach_the_template(tmp_path: Path) -> None:
    tokenizer = load(write_checkpoint(tmp_path, QWEN_STYLE))

    text = tokenizer.apply_chat_template(CHATS[0], variables={"enable_thinking": False})

    assert text.endswith("<think>\n\n</think>\n\n")


def test_a_template_file_comes_before_the_config(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, "from the config")
    (path / "chat_template.jinja").write_text("from the file {{ bos_token }}")

    assert load(path).apply_chat_template(CHATS[0]) == f"from the file {BEGIN}"


def test_requests_with_tools_take_the_template_made_for_them(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    tokenizer = load(write_checkpoint(tmp_path, named))

    assert tokenizer.apply_chat_template(CHATS[0]) == "plain"
    assert tokenizer.apply_chat_template(CHATS[0], tools=TOOLS) == "tools"


def test_special_tokens_may_be_objects(tmp_path: Path) -> None:
    entry = {"content": "<s>", "lstrip": False, "special": True}
    tokenizer = load(write_checkpoint(tmp_path, "{{ bos_token }}{{ pad_token }}", bos_token=entry))

    assert tokenizer.apply_chat_template(CHATS[0]) == "<s>"


@pytest.mark.parametrize(
    ("template", "messages", "says"),
    [
        (LLAMA_STYLE, [{"role": "wizard", "content": "x"}], "Unknown role: wizard"),
        (LLAMA_STYLE, [], "no element 0"),
        (LLAMA_STYLE, [{"role": "user", "content": object()}], "must be plain JSON data"),
        ("{% if %}", CHATS[0], "must fit the model's chat template"),
        ("{{ messages.__class__.__mro__ }}", CHATS[0], "unsafe"),
        ("{{ messages.append(1) }}", CHATS[0], "unsafe|not safely callable"),
        (
            [{"name": "rag", "template": "x"}],
            CHATS[0],
            "that is named default, got rag",
        ),
    ],
)
def test_messages_that_do_not_fit_are_refused(
    tmp_path: Path, template: object, messages: list[dict[str, Any]], says: str
) -> None:
    tokenizer = load(write_checkpoint(tmp_path, template))

    with pytest.raises(ValueError, match=says):
        tokenizer.apply_chat_template(messages)


def test_a_model_without_chat_template_says_so(tmp_path: Path) -> None:
    tokenizer = load(write_checkpoint(tmp_path))

    with pytest.raises(ValueError, match="chat_template must be in"):
        tokenizer.apply_chat_template(CHATS[0])


@pytest.mark.parametrize("template", [7, {"a": "b"}, [{"name": "default"}], ["text"]])
def test_malformed_templates_are_refused(tmp_path: Path, template: object) -> None:
    with pytest.raises(ValueError, match=r"chat_template in .* must be a string or a list"):
        Tokenizer.from_dir(write_checkpoint(tmp_path, template))


def test_other_threads_run_while_a_long_text_is_encoded() -> None:
    tokenizer, ticks, is_over = Tokenizer(byte_level_bpe()), [], threading.Event()

    def tick() -> None:
        while not is_over.wait(0.001):
            ticks.append(time.monotonic())

    thread = threading.Thread(target=tick)
    thread.start()
    found = 0
    for _ in range(20):  # a busy machine may not let it run at once
        start_s = time.monotonic()
        tokenizer.encode("the cat sat on the mat " * 40_000)
        found = max(found, sum(start_s < tick_s < time.monotonic() for tick_s in ticks))
        if found > 5:
            break
    is_over.set()
    thread.join()

    assert found > 5, "encoding holds every other thread"


def broken_tokenizer(path: Path, **changes: Any) -> Path:
    """A checkpoint whose tokenizer.json has some nested entries replaced, by dotted name."""
    entries = json.loads(byte_level_bpe().to_str())
    for name, value in changes.items():
        *parents, last = name.split("__")
        place = entries
        for parent in parents:
            place = place[parent]
        place[last] = value
    (path / "tokenizer.json").write_text(json.dumps(entries))
    return path


@pytest.mark.parametrize(
    "changes",
    [
        {"model__vocab": "\x1b[2J"},
        {"model__vocab": {"a": 2**40}},
        {"model__continuing_subword_prefix": "a" * 5000},  # panics in the library
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Removed"}},
        {"post_processor": {"type": "x"}},
        {"added_tokens": [{}]},
    ],
    ids=str,
)
def test_a_tokenizer_that_cannot_be_read_is_refused_in_a_sentence(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    broken_tokenizer(tmp_path, **changes)

    with pytest.raises(ValueError, match=r"tokenizer\.json must be .*got.*; ") as caught:
        Tokenizer.from_dir(tmp_path)

    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


def test_a_file_that_is_no_tokenizer_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mnemosyne.serve.tokenizer.MAX_BYTES", 100)
    broken_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"tokenizer\.json must hold at most 100 bytes"):
        Tokenizer.from_dir(tmp_path)

    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(ValueError, match=r"must be a file that can be read, got a directory"):
        Tokenizer.from_dir(tmp_path)


def test_a_text_over_which_the_library_panics_is_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_dir(broken_tokenizer(tmp_path, post_processor__special_tokens={}))
    assert tokenizer is not None

    with pytest.raises(ValueError, match=r"prompt must be text that .* can encode") as caught:
        tokenizer.encode("the \x1b[2J")

    assert str(caught.value).isprintable()


def test_a_text_without_a_token_is_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer(tokenizers.Tokenizer(WordLevel({"a": 3, "b": 4}, unk_token="[UNK]")))

    assert tokenizer.encode("a").tolist() == [3]
    with pytest.raises(ValueError, match=r"prompt must be text that .* not 'zebra'.*; "):
        tokenizer.encode("zebra")


@pytest.mark.parametrize("prefix", [(BEGIN,), (BEGIN, END)], ids=["one", "two"])
def test_a_text_that_has_its_first_special_tokens_gets_no_second_ones(
    prefix: tuple[str, ...],
) -> None:
    backend = byte_level_bpe()
    backend.post_processor = processors.TemplateProcessing(
        single=f"{' '.join(prefix)} $A",
        special_tokens=[(t, backend.token_to_id(t)) for t in prefix],
    )
    tokenizer = Tokenizer(backend)
    once = [*map(backend.token_to_id, prefix), *tokenizer.encode("the", add_special_tokens=False)]

    assert tokenizer.encode("the").tolist() == once
    assert tokenizer.encode("".join(prefix) + "the").tolist() == once
    assert tokenizer.encode("".join(prefix * 2) + "the").tolist() == [*once[: len(prefix)], *once]


def test_special_tokens_in_the_middle_of_a_text_stay() -> None:
    tokenizer = Tokenizer(byte_level_bpe())
    (begin,) = tokenizer.encode(BEGIN, add_special_tokens=False)

    assert tokenizer.encode(f"the{BEGIN}cat").tolist().count(begin) == 2


@pytest.mark.parametrize(
    ("entries", "file"),
    [
        ({"eos_token": END}, "tokenizer_config.json"),
        ({"eos_token": {"content": END, "lstrip": False}}, "tokenizer_config.json"),
        ({"eos_token": END}, "special_tokens_map.json"),
    ],
    ids=["text", "object", "map"],
)
def test_the_token_that_ends_a_text_is_known_where_a_file_names_it(
    tmp_path: Path, entries: dict[str, object], file: str
) -> None:
    byte_level_bpe().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / file).write_text(json.dumps(entries))

    assert load(tmp_path).end_id == byte_level_bpe().token_to_id(END)


def test_a_model_whose_files_name_no_end_has_none(tmp_path: Path) -> None:
    byte_level_bpe().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<no such token>"}))

    assert load(tmp_path).end_id is None
