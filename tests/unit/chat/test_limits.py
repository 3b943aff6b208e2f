"""Templates without an end, or with results of any size, are stopped."""

import re
import threading
import time
import tracemalloc

import pytest

from streamllm.chat import ChatTemplateError, Limits, render
from streamllm.chat.budget import Budget
from tests.unit.chat.samples import CHATS, SPECIAL, STYLES

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
FEW_STEPS = Limits(steps=100_000, seconds=0.3, size=1_000_000)
SMALL_SIZE = Limits(steps=500_000, seconds=1e9, size=200_000)


@pytest.mark.parametrize("case", [*ENDLESS, *LARGE])
def test_endless_and_large_templates_are_stopped(case):
    outcome = []
    seconds = []

    def work():
        started = time.thread_time()  # not by the clock: the machine may be busy
        try:
            source, limits = (LARGE[case], SMALL_SIZE) if case in LARGE else (ENDLESS[case], FEW_STEPS)
            outcome.append(render(source, CHATS["one"], limits=limits))
        except ChatTemplateError as error:
            outcome.append(error)
        seconds.append(time.thread_time() - started)

    thread = threading.Thread(target=work)  # signals do not reach it
    thread.start()
    thread.join(100)
    assert outcome, "it does not end"
    assert isinstance(outcome[0], ChatTemplateError), str(outcome[0])[:80]
    reasons = (
        "makes more text|no template may|Range too big" if case in LARGE else "takes more than|too deeply"
    )
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
def test_large_templates_use_little_memory(source):
    limits = Limits(seconds=1e9, size=300_000)
    with pytest.raises(ChatTemplateError, match="makes more text"):
        render(source, CHATS["one"], limits=limits)  # compiles it
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
def test_each_operation_takes_a_step(expression):
    names = "{% macro f() %}{% endmacro %}{% set n = messages | length %}{% set a = 'text' %}"
    source = names + "{% set x = [" + ", ".join([expression] * 40) + "] %}"
    render(source, CHATS["one"], limits=Limits(steps=200))
    with pytest.raises(ChatTemplateError, match="takes more than 30 steps"):
        render(source, CHATS["one"], limits=Limits(steps=30))


def test_default_limits_allow_long_chats_and_stop_in_time():
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


def test_each_prompt_has_a_budget_of_its_own():
    for _ in range(3):
        with pytest.raises(ChatTemplateError, match="stopped"):
            render("{% for a in range(9999) %}{% endfor %}", CHATS["one"], limits=Limits(steps=1000))
        assert (
            render("{% for a in range(900) %}{% endfor %}ok", CHATS["one"], limits=Limits(steps=1000)) == "ok"
        )


APPEND = {
    "+": "{% set ns.o = ns.o + m.role + ': ' + m.content + '\n' %}",
    "~": "{% set ns.o = ns.o ~ m.role ~ ': ' ~ m.content ~ '\n' %}",
}


@pytest.mark.parametrize("operator", APPEND)
def test_a_prompt_that_is_written_part_by_part_is_paid_once(operator):
    """Each part makes a new text, and the one before is no longer in use."""
    source = f"{{% set ns = namespace(o='') %}}{{% for m in messages %}}{APPEND[operator]}{{% endfor %}}{{{{ ns.o }}}}"
    messages = [{"role": "user", "content": "x" * 2000}] * 1000
    limits = Limits(size=10_000)
    assert len(render(source, messages, limits=limits)) == 1000 * 2007


def test_lists_that_grow_are_paid_by_the_element():
    source = "{% set ns = namespace(o=[]) %}{% for m in messages %}{% set ns.o = ns.o + [m] %}{% endfor %}"
    messages = [{"role": "user", "content": "x" * 2000}] * 500
    assert render(source + "{{ ns.o | length }}", messages, limits=Limits(size=10_000)) == "500"


@pytest.mark.parametrize("made", ["a + 'x'", "a ~ 'x'", "'x' + a", "a + a"])
def test_joined_texts_that_stay_in_use_are_paid_for(made):
    kept = "".join(f"{{% set b{i} = {made} %}}" for i in range(300))
    with pytest.raises(ChatTemplateError, match="makes more text"):
        render("{% set a = 'x' * 20000 %}" + kept, CHATS["one"], limits=Limits(seconds=1e9, size=300_000))
    listed = "{% set ns = namespace(x=[]) %}{% for i in range(300) %}{% set ns.x = ns.x + [@] %}{% endfor %}"
    with pytest.raises(ChatTemplateError, match="makes more text"):
        render(
            "{% set a = 'x' * 20000 %}" + listed.replace("@", made),
            CHATS["one"],
            limits=Limits(seconds=1e9, size=300_000),
        )


def test_arguments_of_a_macro_are_not_new():
    source = "{% macro f(all, i) %}{{ all[i].role }}{% endmacro %}{% for m in messages %}{{ f(messages, loop.index0) }}"
    messages = [{"role": "user", "content": "x" * 2000}] * 1000
    assert render(source + "{% endfor %}", messages, limits=Limits(size=10_000)) == "user" * 1000


def test_the_error_names_the_limit_that_acts():
    messages = [{"role": "user", "content": "x" * 1000}]
    with pytest.raises(ChatTemplateError, match=r"than ([\d,]+) characters") as caught:
        render("{{ messages[0].content * 1000 }}", messages, limits=Limits(size=10_000))
    number = int(re.search(r"than ([\d,]+)", str(caught.value))[1].replace(",", ""))
    assert number > 256_000  # 256 times the input, which is why this much is allowed
    assert len(render("{{ messages[0].content * 100 }}", messages, limits=Limits(size=10_000))) == 100_000


def test_steps_and_seconds_grow_with_the_input():
    """Some templates look at all earlier messages for each message."""
    source = "{% for a in messages %}{% for b in messages %}{% endfor %}{% endfor %}ok"
    limits = Limits(steps=150_000)
    for count in (300, 1500):
        messages = [{"role": "user", "content": "x"}] * count
        if count == 300:
            assert render(source, messages, limits=limits) == "ok"
        else:
            with pytest.raises(ChatTemplateError, match="takes more than 300,000 steps"):
                render(source, messages, limits=limits)


def test_time_is_counted_while_the_template_runs_and_not_while_it_waits():
    budget = Budget(Limits(seconds=0.05), {})
    time.sleep(0.2)
    for _ in range(1000):
        budget.step()

    def run():
        while True:
            budget.step()

    with pytest.raises(ChatTemplateError, match=r"takes more than 0\.05 seconds"):
        run()
