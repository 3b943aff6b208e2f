"""Chat templates: what transformers renders, and what strangers may try."""

import json
import re
import threading
import time
import tracemalloc
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from streamllm.chat import ChatTemplateError, Limits, render
from streamllm.tokenizer import TOKENIZER_FILES, TokenizerError, load_tokenizer_files

# Prompts in the styles of well-known families, written for this test with the constructs that theirs use.
STYLES = {
    path.stem: path.read_text(encoding="utf-8")
    for path in sorted((Path(__file__).parent / "chat_templates").glob("*.jinja"))
}

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": 'What it is like <outside> & "inside"',
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": ["integer", "null"], "enum": [1, 2.5, None, True]},
            },
            "required": ["city"],
        },
        "return": {"type": "string"},
    },
}
CALL = {
    "id": "abc123def",
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Zürich"}},
}

CHATS = {
    "one": [{"role": "user", "content": " Hello! "}],
    "system": [
        {"role": "system", "content": "Be <brief>.\n"},
        {"role": "user", "content": "Wer bist du?\r\n\r\n\n\n日本語 👩‍👧 é"},
        {"role": "assistant", "content": "  I am …  "},
        {"role": "user", "content": "</s><|im_end|> {{ bos_token }} {% raw %}"},
    ],
    "long": [
        {"role": ("user", "assistant")[turn % 2], "content": f"turn {turn}\n" * (turn + 1)}
        for turn in range(9)
    ],
    "tools": [
        {"role": "user", "content": "What is it like in Zürich?", "name": None},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": '{"sky": "clear"}', "tool_call_id": "abc123def"},
        {"role": "assistant", "content": "<think>\nclear\n</think>\n\nClear.", "tool_calls": None},
        {"role": "user", "content": "Thanks"},
    ],
    "thinking": [
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "4", "thinking": "two and two"},
        {"role": "user", "content": "3+3?"},
        {"role": "assistant", "content": "6", "reasoning": "\nthree and three\n"},
    ],
    "parts": [
        {"role": "system", "content": [{"type": "text", "text": "See."}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " What is it? "}]},
    ],
    "two calls": [
        {"role": "user", "content": "And in Bern?"},
        {"role": "assistant", "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": {"sky": ["grey", 3.5, None]}},
        {"role": "tool", "content": "rain", "tool_call_id": "x"},
    ],
    "unknown role": [{"role": "narrator", "content": "Once upon a time"}],
    "wrong turns": [{"role": "assistant", "content": "Hi"}, {"role": "assistant", "content": "Hi again"}],
}
OPTIONS = [
    {},
    {"add_generation_prompt": True},
    {"add_generation_prompt": True, "tools": [WEATHER], "enable_thinking": False, "date_string": "1 May"},
    {
        "tools": [WEATHER, WEATHER],
        "documents": [{"title": "on time", "text": "Time flies like an arrow, so they say."}],
    },
    {"tools": [], "bos_token": "<other>"},
]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.fixture(scope="module")
def library():
    """A byte-level tokenizer that knows the markers of the templates."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({name: index for index, name in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>"])
    tokenizer.add_tokens(["[INST]", "[/INST]"])
    return tokenizer


@pytest.mark.parametrize("style", STYLES)
def test_renders_what_transformers_renders(style, library, tmp_path):
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(tokenizer_object=library, chat_template=STYLES[style], **SPECIAL)
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**SPECIAL, "chat_template": STYLES[style]}))
    ours = load_tokenizer_files(tmp_path)
    rendered = refused = 0
    for chat in CHATS.values():
        for options in OPTIONS:
            try:
                expected = theirs.apply_chat_template(chat, tokenize=False, **options)
            except Exception:
                refused += 1
                with pytest.raises(ChatTemplateError):
                    ours.render_chat_template(chat, **options)
                continue
            rendered += 1
            assert ours.render_chat_template(chat, **options) == expected
            ids = theirs.apply_chat_template(chat, tokenize=True, return_dict=False, **options)
            assert ours.apply_chat_template(chat, **options) == ids
    assert rendered >= 15
    assert refused >= (5 if "raise_exception" in STYLES[style] else 0)


def test_templates_write_bos_themselves(library, tmp_path):
    from tokenizers import processors

    library = Tokenizer.from_str(library.to_str())
    bos = library.token_to_id("<s>")
    library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(SPECIAL))
    (tmp_path / "chat_template.jinja").write_text(STYLES["llama_2"])
    tokenizer = load_tokenizer_files(tmp_path)
    assert tokenizer.encode("x")[0] == bos
    assert tokenizer.apply_chat_template(CHATS["one"]).count(bos) == 1


# ---------------------------------------------------------------------------------------- where templates are


def test_template_by_name():
    named = {"default": "plain", "tool_use": "with {{ tools | length }}", "rag": "no"}
    assert render(named, CHATS["one"]) == "plain"
    assert render(named, CHATS["one"], tools=[WEATHER]) == "with 1"
    assert render(named, CHATS["one"], tools=[]) == "with 0"
    assert render({"default": "plain"}, CHATS["one"], tools=[WEATHER]) == "plain"
    with pytest.raises(ChatTemplateError, match="rag, tool_use is called default"):
        render({"tool_use": "", "rag": ""}, CHATS["one"])
    with pytest.raises(ChatTemplateError, match="has no chat template"):
        render(None, CHATS["one"])


def test_template_files(library, tmp_path):
    library.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer_files(tmp_path).chat_template is None
    config = tmp_path / "tokenizer_config.json"
    templates = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    config.write_text(json.dumps({"chat_template": templates}))
    tokenizer = load_tokenizer_files(tmp_path)
    assert tokenizer.chat_template == {"default": "a", "tool_use": "b"}
    assert tokenizer.render_chat_template(CHATS["one"], tools=[]) == "b"
    assert tokenizer.render_chat_template(CHATS["one"], chat_template="mine") == "mine"
    (tmp_path / "chat_template.jinja").write_text("file\n")
    tokenizer = load_tokenizer_files(tmp_path)
    assert tokenizer.chat_template == "file\n"
    assert tokenizer.render_chat_template(CHATS["one"]) == "file"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("more")
    assert load_tokenizer_files(tmp_path).chat_template == {"default": "file\n", "tool_use": "more"}
    assert set(TOKENIZER_FILES) >= {"chat_template.jinja", "additional_chat_templates/tool_use.jinja"}


@pytest.mark.parametrize("value", [3, True, [], {}, ["a"], [{"name": "default"}], {"default": None}])
def test_template_of_a_wrong_type(value, library, tmp_path):
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}))
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json: chat_template"):
        load_tokenizer_files(tmp_path)


def test_template_file_that_is_no_text(library, tmp_path):
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(TokenizerError, match=r"chat_template\.jinja cannot be read"):
        load_tokenizer_files(tmp_path)


# -------------------------------------------------------------------------------------------- what users give


@pytest.mark.parametrize(
    "messages", [[], {}, "Hello", None, ["Hello"], [{"content": object()}], [{"a": b"x"}]]
)
def test_messages_that_are_none(messages):
    with pytest.raises(ChatTemplateError, match="message"):
        render("{{ messages }}", messages)


def test_objects_do_not_reach_the_template():
    class Text(str):
        def shout(self):
            return "ran"

    assert render("{{ messages[0].content }}", [{"content": Text("quiet")}]) == "quiet"
    assert render("{{ messages[0].content.shout is defined }}", [{"content": Text("quiet")}]) == "False"
    with pytest.raises(ChatTemplateError, match="a template variable holds a function"):
        render("{{ f() }}", CHATS["one"], f=lambda: 1)
    with pytest.raises(ChatTemplateError, match="tools holds a function"):
        render("{{ tools }}", CHATS["one"], tools=[lambda: 1])
    nested = []
    nested.append(nested)
    with pytest.raises(ChatTemplateError, match="nested too deeply"):
        render("{{ messages }}", [{"content": nested}])


def test_messages_are_not_changed():
    message = {"role": "user", "content": "x", "name": None, "thinking": "y"}
    render("{{ messages }}", [message])
    assert message == {"role": "user", "content": "x", "name": None, "thinking": "y"}


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ("{% if %}", r"does not work \(line 1\)"),
        ("\n{{ 'open }}", r"\(line 2\)"),
        ("{% for x in messages %}", "endfor"),
        ("{{ messages | no_such_filter }}", "no_such_filter"),
        ("{% include 'x' %}", "does not work"),
        ("{% import '/etc/passwd' as x %}", "does not work"),
        ("{% extends 'x' %}", "does not work"),
        ("{{ missing.attribute }}", "'missing' is undefined"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ 'x' | tojson(indent=none) * none }}", "does not work"),
        ("{{ raise_exception('the reason') }}", "refuses these messages: the reason"),
        ("{{ {} + 1 }}", "does not work"),
        ("{{ missing | tojson }}", "does not work"),
        ("{{ " + "(" * 5000 + ")" * 5000 + " }}", "nested too deeply|does not work"),
        ("{{ " + "-" * 5000 + "1 }}", "nested too deeply|does not work"),
        ("{{ 1" + "+1" * 5000 + " }}", "nested too deeply|does not work"),
        ("{% if 1 %}" * 3000 + "{% endif %}" * 3000, "nested too deeply|does not work"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "nested too deeply"),
        ("x" * 100_001, "has 100,001 characters; at most 100,000"),
    ],
)
def test_templates_that_do_not_work(source, match):
    with pytest.raises(ChatTemplateError, match=match) as caught:
        render(source, CHATS["one"])
    assert len(str(caught.value)) < 600


# ----------------------------------------------------------------------------------------- what strangers try

ESCAPES = [
    "{{ ''.__class__ }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__'] }}",
    "{{ '' | attr('__class__') }}",
    "{{ '' | attr('_' * 2 ~ 'class' ~ '_' * 2) }}",
    "{{ [''] | map(attribute='__class__') | list }}",
    "{{ [''] | map('attr', '__class__') | list }}",
    "{{ messages | sort(attribute='__class__') }}",
    "{{ messages | groupby('__class__') }}",
    "{{ messages | selectattr('__class__') | list }}",
    "{{ messages | sum(attribute='__class__') }}",
    "{{ '{0.__class__}'.format(1) }}",
    "{{ '{x.__class__}'.format_map({'x': 1}) }}",
    "{{ ('{0.__class__}' | attr('format'))(1) }}",
    "{{ (['{0.__class__}'.format] | first)(1) }}",
    "{{ (['{0.__class__}'] | map('attr', 'format') | first)(1) }}",
    "{{ raise_exception.__globals__ }}",
    "{{ raise_exception.__code__ }}",
    "{{ strftime_now.__init__ }}",
    "{{ namespace.__init__ }}",
    "{{ namespace.mro() }}",
    "{{ dict.__class__ }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ self.__init__ }}",
    "{{ self._TemplateReference__context }}",
    "{{ loop.__class__ }}{% for x in [1] %}{{ loop.__class__ }}{% endfor %}",
    "{% macro m() %}{% endmacro %}{{ m._environment }}",
    "{% macro m() %}{% endmacro %}{{ m.__call__ }}",
    "{% set ns = namespace(_x=1) %}",
    "{% set ns = namespace() %}{% set ns._x = 1 %}",
    "{% set ns = namespace(**{'__class__': 1}) %}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'role': 'x'}) }}",
    "{{ messages[0].pop('role') }}",
    "{{ messages.sort() }}",
    "{{ 'x'.encode() }}",
    "{{ 'x'.translate({120: 'y'}) }}",
    "{{ (1).to_bytes(1000000000, 'big') }}",
    "{{ (1).from_bytes([1]) }}",
    "{{ (1.5).as_integer_ratio() }}",
    "{{ {}.fromkeys([1]) }}",
    "{{ ('<b>' | safe).striptags() }}",
    "{{ messages | map('attr', 'append') | list }}{{ messages.append }}",
    "{{ missing.__class__ }}",
    "{{ messages[0].items().mapping }}",
    "{{ range(3).start }}",
    "{{ messages.__len__() }}",
    "{{ 'x'.maketrans }}",
    "{% for x in [1] %}{{ loop._iterator }}{% endfor %}",
    "{{ raise_exception.__name__ }}",
    "{{ lipsum() }}",
    "{{ 'x' | pprint }}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_no_way_out(source):
    with pytest.raises(ChatTemplateError):
        render(source, CHATS["one"])


DOUBLE = """\
{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = @ %}{% endfor %}{{ ns.x | length }}
"""
ENDLESS = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "nested loops that filter": "{% for a in range(99999) %}"
    "{% for b in range(99999) if b == a + 1 %}{% endfor %}{% endfor %}",
    "nested loops that count": "{% set n = namespace(x=0) %}"
    + "{% for a in range(99999) %}" * 5
    + "{% set n.x = n.x + 1 %}"
    + "{% endfor %}" * 5,
    "macros that call twice": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}"
    "{% endmacro %}{{ f(60) }}",
    "call blocks": "{% macro f(n) %}{% set used = caller %}{% if n %}{% call f(n - 1) %}{% endcall %}"
    "{% call f(n - 1) %}{% endcall %}{% endif %}{% endmacro %}{% call f(60) %}{% endcall %}",
    "blocks": "{% block b %}{% if x is not defined %}{{ self.b() }}{% endif %}{% endblock %}",
    "recursive loops": "{% for x in [1, 2] recursive %}{{ loop([1, 2]) if loop.depth < 60 }}{% endfor %}",
    "a filter over and over": "{% for a in range(99999) %}{% set x = range(99999) | sum %}{% endfor %}",
    "a test over and over": "{% for a in range(99999) %}{% set x = 5 is in(messages) %}{% endfor %}",
    "comparisons": "{% set a = 'x' * 200000 %}{% set b = 'x' * 200000 %}{% for i in range(99999) %}{{ "
    + " and ".join(["a == b"] * 50)
    + " }}{% endfor %}",
}
LARGE = {
    "output": "{% for a in range(99999) %}" + "x" * 10_000 + "{% endfor %}",
    "output of a macro": "{% macro f() %}{% for a in range(9999) %}"
    + "x" * 10_000
    + "{% endfor %}{% endmacro %}{{ f() }}",
    "output of set": "{% set y %}{% for a in range(99999) %}{{ 'x' * 10000 }}{% endfor %}{% endset %}",
    "output of filter": "{% filter upper %}"
    "{% for a in range(99999) %}{{ 'x' * 10000 }}{% endfor %}{% endfilter %}",
    "times": "{{ 'a' * 1000000000 }}",
    "times from the left": "{{ 1000000000 * 'a' }}",
    "times of a list": "{{ [0] * 1000000000 }}",
    "times of times": "{{ ([[0] * 1000] * 1000) * 1000 }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "power of a variable": "{% set n = 10 %}{{ n ** 100000000 }}",
    "squares": DOUBLE.replace("'ab'", "3").replace("@", "ns.x * ns.x"),
    "a long number": "{{ ('9' * 4000) | int * ('9' * 4000) | int }}",
    "a long number in base 16": "{{ ('f' * 5000000) | int(0, 16) }}",
    "doubling by +": DOUBLE.replace("@", "ns.x + ns.x"),
    "doubling by ~": DOUBLE.replace("@", "ns.x ~ ns.x"),
    "doubling by %": DOUBLE.replace("@", "'%s%s' % (ns.x, ns.x)"),
    "doubling by format": DOUBLE.replace("@", "'{0}{0}'.format(ns.x)"),
    "doubling by the format filter": DOUBLE.replace("@", "'%s%s' | format(ns.x, ns.x)"),
    "doubling by join": DOUBLE.replace("@", "ns.x.join(['', '', ''])"),
    "doubling by the join filter": DOUBLE.replace("@", "['', '', ''] | join(ns.x)"),
    "doubling by replace": DOUBLE.replace("@", "ns.x.replace('a', 'aa')"),
    "doubling by the replace filter": DOUBLE.replace("@", "ns.x | replace('a', 'aa')"),
    "doubling by lists": DOUBLE.replace("'ab'", "[1]").replace("@", "ns.x + ns.x"),
    "lists within lists": DOUBLE.replace("'ab'", "[1]").replace("@", "[ns.x, ns.x]"),
    "tuples as keys": DOUBLE.replace("'ab'", "1").replace("@", "(ns.x, ns.x)") + "{{ {ns.x: 1} }}",
    "dicts within dicts": DOUBLE.replace("@", "{'a': ns.x, 'b': ns.x}"),
    "dict()": DOUBLE.replace("@", "dict(a=ns.x, b=ns.x)"),
    "arguments": "{% set ns = namespace(x=1) %}{% macro f() %}{% set ns.x = varargs %}{% endmacro %}"
    "{% for i in range(60) %}{{ f(ns.x, ns.x) }}{% endfor %}{{ ns.x }}",
    "fromkeys": DOUBLE.replace("@", "dict.fromkeys(['a', 'b'], ns.x)"),
    "map of a default": "{{ ([0] * 99999) | map('default', 'x' * 10000, true) | list | length }}",
    "cycler": DOUBLE.replace("@", "cycler(ns.x, ns.x).items"),
    "groups": DOUBLE.replace("'ab'", "[{'k': 1}]").replace("@", "[{'k': ns.x, 'l': ns.x}] | groupby('k')"),
    "slices": "{% set a = 'x' * 300000 %}" + "".join(f"{{% set b{i} = a[1:] %}}" for i in range(60)),
    "slices of lists": "{% set a = [1] * 100000 %}" + "".join(f"{{% set b{i} = a[:] %}}" for i in range(60)),
    "upper": "{% set a = 'x' * 300000 %}" + "".join(f"{{% set b{i} = a | upper %}}" for i in range(60)),
    "upper()": "{% set a = 'x' * 300000 %}" + "".join(f"{{% set b{i} = a.upper() %}}" for i in range(60)),
    "center": "{{ 'x' | center(1000000000) }}",
    "center by name": "{{ 'x' | center(width=1000000000) }}",
    "center()": "{{ 'x'.center(1000000000) }}",
    "ljust": "{{ 'x'.ljust(1000000000) }}",
    "rjust": "{{ 'x'.rjust(1000000000, 'y') }}",
    "zfill": "{{ 'x'.zfill(1000000000) }}",
    "expandtabs": "{{ '\\t'.expandtabs(1000000000) }}",
    "expandtabs by name": "{{ '\\t'.expandtabs(tabsize=1000000000) }}",
    "many tabs": "{{ ('\\t' * 1000000).expandtabs(1000) }}",
    "indent": "{{ 'a\\nb' | indent(1000000000) }}",
    "indent of many lines": "{{ ('\\n' * 1000000) | indent(1000, blank=true) }}",
    "indent by a text": "{{ ('a\\n' * 1000000) | indent('x' * 1000) }}",
    "percent": "{{ '%1000000000d' % 1 }}",
    "percent with a star": "{{ '%*d' % (1000000000, 1) }}",
    "percent with flags": "{{ '%-+#01000000000.3f' % 1 }}",
    "percent precision": "{{ '%.1000000000f' % 1 }}",
    "the format filter": "{{ '%1000000000d' | format(1) }}",
    "format": "{{ '{:1000000000}'.format(1) }}",
    "format precision": "{{ '{:.1000000000f}'.format(1.0) }}",
    "format by a variable": "{{ '{:{}}'.format(1, 1000000000) }}",
    "format_map": "{{ '{x:1000000000}'.format_map({'x': 1}) }}",
    "format of a safe text": "{{ ('{:1000000000}' | safe).format(1) }}",
    "formats mapped": "{{ (['{:1000000000}'] | map('attr', 'format') | first)(1) }}",
    "range": "{{ range(1000000000) | list }}",
    "batch": "{{ [1] | batch(1000000000, 'x') | list }}",
    "slice": "{{ [1] | slice(1000000000) | list }}",
    "round": "{{ 1.5 | round(1000000000, 'ceil') }}",
    "round of a whole number": "{{ 5 | round(-1000000000) }}",
    "tojson": "{{ [[[[1]]]] | tojson(indent=1000000000) }}",
    "tojson by a text": "{{ ([1] * 100000) | tojson(indent='x' * 10000) }}",
    "tojson separators": "{{ ([1] * 100000) | tojson(separators=('x' * 10000, '')) }}",
    "views of dicts": "{% set ns = namespace(x=1) %}"
    + "{% set ns.x = {'a': ns.x, 'b': ns.x}.values() %}" * 60
    + "{{ ns.x }}",
    "rfind": "{{ ('a' * 30000).rfind('ab' + 'a' * 9000) }}",
    "rsplit": "{{ ('a' * 30000).rsplit('ab' + 'a' * 9000) | length }}",
    "rpartition": "{{ ('a' * 30000).rpartition('ab' + 'a' * 9000) | length }}",
    "strip": "{{ ('a' * 30000).strip('b' * 9000 + 'a') }}",
    "trim": "{{ ('a' * 30000) | trim('b' * 9000 + 'a') }}",
    "equal hashes": "{{ dict.fromkeys(range(0, 230584300921369395100000, 2305843009213693951)) | length }}",
    "sum of lists": "{{ [[1]] | sum(start=[]) }}",
    "strftime": "{{ strftime_now('%1000000000d' * 1000) }}",
    "joins": "{{ (['x'] * 100000) | join('y' * 100000) }}",
    "join()": "{{ ('y' * 100000).join(['x'] * 100000) }}",
    "replace of nothing": "{{ ('x' * 100000).replace('', 'y' * 100000) }}",
    "list of a text": "{{ ('\\u4e00' * 4000000) | list | length }}",
    "split": "{{ ('a ' * 3000000).split() | length }}",
}
QUICK = Limits(steps=100_000, seconds=0.3, size=1_000_000)
SMALL = Limits(steps=500_000, seconds=1e9, size=200_000)


@pytest.mark.parametrize("case", [*ENDLESS, *LARGE])
def test_templates_without_end_are_stopped(case):
    outcome = []
    seconds = []

    def work():
        started = time.thread_time()  # the machine may be busy with other things
        try:
            source, limits = (LARGE[case], SMALL) if case in LARGE else (ENDLESS[case], QUICK)
            outcome.append(render(source, CHATS["one"], limits=limits))
        except ChatTemplateError as error:
            outcome.append(error)
        seconds.append(time.thread_time() - started)

    thread = threading.Thread(target=work)  # where no signal arrives
    thread.start()
    thread.join(100)
    assert outcome, "it runs on"
    assert isinstance(outcome[0], ChatTemplateError), str(outcome[0])[:80]
    reasons = "makes more text|no template may|Range too big" if case in LARGE else "takes over|too deeply"
    assert re.search(reasons, str(outcome[0]))
    assert seconds[0] < 5


IN_A_MACRO = "{% macro f() %}{% for i in range(9999) %}@{% endfor %}{% endmacro %}{{ f() }}"


@pytest.mark.parametrize(
    "source",
    [
        LARGE["doubling by ~"],
        LARGE["lists within lists"],
        LARGE["output of set"],
        LARGE["split"],
        LARGE["joins"],
        "{{ '\\t'.expandtabs(20000000) }}",
        "{{ ('\\t' * 20000).expandtabs(1000) }}",
        "{{ ('y' * 20000).join(['x'] * 1000) }}",
        "{{ (['x'] * 1000) | join('y' * 20000) }}",
        "{{ ('x' * 10000).replace('', 'y' * 2000) }}",
        "{{ ('x' * 10000) | replace('', 'y' * 2000) }}",
        "{{ 'x'.center(20000000) }}",
        "{{ 'x' | center(20000000) }}",
        "{{ ('x\\n' * 1000) | indent(20000) }}",
        "{{ ([1] * 1000) | tojson(indent=20000) }}",
        "{{ ([1] * 1000) | tojson(separators=('x' * 20000, '')) }}",
        "{{ [1] | batch(2000000, 'x') | list }}",
        "{{ ('%s' * 1000) % ((['x' * 20] * 1000) | list) }}{{ ('%s' * 1000) | format('x' * 20000) }}",
        "{{ ('{0}' * 1000).format('x' * 20000) }}",
        "{% set a = [0] * 20000 %}" + IN_A_MACRO.replace("@", "{{ a }}"),
        "{% set a = 'x' * 20000 %}" + IN_A_MACRO.replace("@", "{{ a | upper }}"),
        "{% set a = 'x' * 20000 %}" + "".join(f"{{% set b{i} = a.upper() %}}" for i in range(300)),
        "{% set a = 'x' * 20000 %}" + "".join(f"{{% set b{i} = a[1:] %}}" for i in range(300)),
    ],
)
def test_templates_without_bound_stay_small(source):
    limits = Limits(seconds=1e9, size=300_000)
    with pytest.raises(ChatTemplateError, match="makes more text"):
        render(source, CHATS["one"], limits=limits)  # once to compile it
    tracemalloc.start()
    try:
        with pytest.raises(ChatTemplateError, match="makes more text"):
            render(source, CHATS["one"], limits=limits)
        assert tracemalloc.get_traced_memory()[1] < 12e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "expression",
    [
        "1 == n",
        "n in [2]",
        "n + 1",
        "n ~ 1",
        "[n]",
        "{1: n}",
        "(n, n)",
        "n | abs",
        "n is string",
        "f()",
        "a[1:]",
    ],
)
def test_everything_takes_a_step(expression):
    names = "{% macro f() %}{% endmacro %}{% set n = messages | length %}{% set a = 'text' %}"
    source = names + "{% set x = [" + ", ".join([expression] * 40) + "] %}"
    render(source, CHATS["one"], limits=Limits(steps=200))
    with pytest.raises(ChatTemplateError, match="takes over 30 steps"):
        render(source, CHATS["one"], limits=Limits(steps=30))


def test_default_limits_stop_within_seconds_and_allow_long_chats():
    long = [{"role": ("user", "assistant")[turn % 2], "content": "word " * 300} for turn in range(1001)]
    for style in STYLES:
        if style not in ("llama_2", "mistral"):
            assert len(render(STYLES[style], long, special_tokens=SPECIAL, limits=Limits(seconds=60))) > (
                0 if style == "everything" else 1_000_000
            )
    started = time.monotonic()
    with pytest.raises(ChatTemplateError, match=r"steps|seconds"):
        render(ENDLESS["nested loops"], CHATS["one"], limits=Limits(seconds=1.0))
    assert time.monotonic() - started < 10


def test_a_stopped_template_leaves_the_next_one_its_budget():
    for _ in range(3):
        with pytest.raises(ChatTemplateError, match="stopped"):
            render("{% for a in range(9999) %}{% endfor %}", CHATS["one"], limits=Limits(steps=1000))
        assert (
            render("{% for a in range(900) %}{% endfor %}ok", CHATS["one"], limits=Limits(steps=1000)) == "ok"
        )
