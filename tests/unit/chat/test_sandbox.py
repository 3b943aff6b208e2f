"""Templates cannot reach anything but their variables."""

import pytest

from streamllm.chat import ChatTemplateError, render
from tests.unit.chat.samples import CHATS

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
def test_access_is_refused(source):
    with pytest.raises(ChatTemplateError):
        render(source, CHATS["one"])
