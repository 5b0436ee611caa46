"""What jinja2 makes of templates and expressions, set up as transformers sets it up for chat templates.

Expressions: every test, filter and method of jinja2 that a chat template may use, on values of every kind. Templates: written
for this file in the manner of public families (Qwen2.5, Qwen3, Llama 3.1, Mistral, Hermes, Command R, Gemma, DeepSeek-R1,
Nemotron, Granite, gpt-oss), with tool calls, tools, documents, reasoning and template arguments. Messages go through the same
steps as in `apply_chat_template`. Writes jinja.json. Nothing is random.
Printed with transformers 5.23.0, jinja2 3.1.6.
"""
import json
import pathlib

import jinja2
import transformers
from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

HERE = pathlib.Path(__file__)

# Values of every kind under short names.
VALUES = dict(
    t=True, f=False, n=None, i=3, neg=-7, x=2.5, tiny=1e-07, huge=1e16, s="hello World", e="", u="Ünï ✓ é𝄞", q="it's \"q\" \\ \n",
    sp=" \t\x1d a b \x1c\n", l=[3, 1, 2], l0=[], ls=["b", "A", "c"], d={"b": 1, "a": [2, None, True, 1.0]}, d0={},
    m=[{"role": "user", "n": 2}, {"role": "assistant", "n": 1, "x": {"y": 5}}, {"role": "user", "n": None}],
    schema={"type": "array", "items": {"type": "string"}, "keys": 1}, html="<a href='x'>\"&\"</a>", crlf="a\r\nb\rc\x0bd",
)

KINDS = ["t", "f", "n", "i", "x", "s", "e", "l", "l0", "d", "d0", "missing", "l[1:]", "d.items()", "range(3)", "namespace(a=1)"]
TESTS = ["boolean", "callable", "defined", "escaped", "false", "float", "integer", "iterable", "mapping", "none", "number",
         "sequence", "string", "true", "undefined"]
EXPRESSIONS = [f"{kind} is {test}" for kind in KINDS for test in TESTS]
EXPRESSIONS += [f"{kind} is not {test}" for kind in ["n", "missing", "d"] for test in ["iterable", "sequence", "mapping"]]
EXPRESSIONS += """
i is odd | i is even | x is odd | 6 is divisibleby 3 | 6 is divisibleby(4) | s is lower | 'abc d' is lower | 'ABC D' is upper | e is lower | '1' is upper
1 is eq 1 | 1 is eq true | 's' is equalto 's' | 1 is ne 2 | 1 is lt 2 | 2 is ge 3 | 3 is in [1,3] | 'a' is in 'abc' | none is sameas none | true is sameas 1 | l is sameas l
'upper' is filter | 'nope' is filter | 'iterable' is test | 'nope' is test
""".replace("\n", "|").split("|")
# Filters on every kind of value.
FILTERS = ["string", "list", "length", "count", "tojson", "trim", "upper", "lower", "title", "capitalize", "first", "last", "join",
           "join(', ')", "reverse|list", "sort", "unique|list", "items|list", "default('D')", "default('D', true)", "int", "float",
           "abs", "sum", "min", "max", "dictsort", "safe", "escape", "wordcount"]
EXPRESSIONS += [f"{kind}|{name}" for kind in KINDS[:-3] + ["l[1:]", "u", "sp", "q", "ls", "tiny", "huge"] for name in FILTERS]
EXPRESSIONS += r"""
missing|default(default_value='x') # e|default('x', boolean=true) # e|default('x', boolean=false) # e|d('x', true) # n|default('x')
'12'|int # 'x'|int # 'x'|int(7) # '0x1f'|int(base=16) # '2.9'|int # 2.9|int # 'y'|float(1.5) # '1e3'|float # n|int # n|int(default=4)
2.5|round # 3.5|round # 2.345|round(2) # 2.1|round(method='ceil') # 2.9|round(0, 'floor') # 42|round # -2.5|round(method='common')
m|map(attribute='role')|list # m|map(attribute='x.y')|list # m|map(attribute='x.y', default=0)|list # ls|map('lower')|join(',') # l|map('string')|join # ls|map('replace', 'b', 'z')|list
m|selectattr('x')|list|length # m|selectattr('role', 'equalto', 'user')|list|length # m|selectattr('n', 'none')|list|length # m|rejectattr('x', 'defined')|map(attribute='role')|join('+')
m|selectattr('role', 'in', ['assistant', 'tool'])|list # m|selectattr('x.y', '==', 5)|list|length # l|select('odd')|list # l|reject('gt', 1)|list # [0,1,none,'']|select|list
m|join(',', attribute='role') # m|join(', ', 'role') # [1,none,true,'s',[1,'a'],{'k': 's'}]|join(' ') # m|sum(attribute='n') # [1,2]|sum(start=10)
l|sort(reverse=true) # l|sort(true) # ls|sort # ls|sort(case_sensitive=true) # m[:2]|sort(attribute='n')|map(attribute='n')|list # ls|max # l|min # m[:2]|max(attribute='n')
ls|unique|list # ['a','A']|unique|list # ['a','A']|unique(case_sensitive=true)|list # m|groupby('role')|map(attribute=0)|list # m|unique(attribute='role')|list|length
d|dictsort # d|dictsort(reverse=true) # d|dictsort(false, 'key') # {'a': 2, 'b': 1}|dictsort(by='value') # {'B': 1, 'a': 2}|dictsort # {'B': 1, 'a': 2}|dictsort(true)
'a\nb\n\nc'|indent # 'a\nb'|indent(2) # 'a\nb'|indent(width=2, first=true) # 'a\n\nb'|indent(2, blank=true) # 'a\nb'|indent('>>') # 'a\nb'|indent(2, true)
s|replace('l', 'L') # s|replace('l', 'L', 1) # s|replace('l', 'L', count=2) # i|replace('3', '4') # s|center(20) # s|truncate(5) # s|truncate(5, true, '') # s|truncate(255)
'%s is %d'|format('a', 3) # '%(a)s'|format(a=1) # [1,2,3,4,5]|batch(2)|list # [1,2,3,4,5]|batch(2, 0)|list # [1,2,3,4,5]|slice(2)|list # l|first # l[::-1] # d|first # {'a':1}|items|list
html|e # html|escape # html|forceescape # html|striptags # html|safe # 'a b&c'|urlencode # s|wordcount # s|trim('h') # '--x--'|trim('-') # l|random|string|length # u|reverse # "it's o'clock-now (yes)"|title
d|tojson # d|tojson(indent=2) # d|tojson(indent=none) # d|tojson(indent='\t') # d|tojson(separators=(',', ':')) # d|tojson(indent=1, separators=(',', ' = ')) # d|tojson(sort_keys=true) # u|tojson # u|tojson(ensure_ascii=true) # u|tojson(true)
tiny|tojson # huge|tojson # 1.0|tojson # 0.1|tojson # 123456789012345678|tojson # {1: 2, none: 3, false: 4, 2.5: 5}|tojson # q|tojson # sp|tojson # d0|tojson(indent=2) # {'a': [], 'b': {}}|tojson(indent=2) # missing|tojson # l[1:]|tojson # d.items()|list|tojson # '\u007f\u2028'|tojson # html|tojson
s.split() # 'a,b,,c'.split(',') # 'a,b,c'.split(',', 1) # 'a b  c'.split(none, 1) # ' a b '.split() # 'a,b,c'.rsplit(',', 1) # 'a,b,c'.split(',', maxsplit=1) # 'a,b'.split(',')[-1] # 'a  b c '.rsplit(none, 1) # 'a'.split(',')[0]
'<think>x</think>y'.split('</think>')[-1].lstrip('\n') # 'k=v=w'.partition('=') # 'k=v=w'.rpartition('=') # 'kv'.partition('=') # 'unhappy'.removeprefix('un') # 'file.txt'.removesuffix('.txt') # 'x'.removesuffix('y')
crlf.splitlines() # crlf.splitlines(true) # ''.splitlines() # 'a\n'.splitlines() # 'a\n\nb'.splitlines(keepends=true)
u.find('é') # u.find('zz') # u.find('') # s.find('l', 4) # s.find('l', 0, 2) # u.rfind('é') # s.rfind('l') # s.index('W') # s.index('zz') # 'aXbX'.rindex('X') # s.count('l') # s.count('') # 'aaaa'.count('aa') # s.count('l', 4)
s.startswith('he') # s.startswith(('x', 'he')) # s.startswith('llo', 2) # s.endswith('ld') # s.endswith(('x', 'World')) # s.endswith('hello', 0, 5) # u.upper() # u.lower() # 'ß'.upper() # s.title() # "it's a1b ok".title() # s.capitalize() # 'ÉA'.capitalize() # s.swapcase() # 'ẞ'.casefold()
sp.strip() # sp.lstrip() # sp.rstrip() # 'xxhixx'.strip('x') # 'abcba'.strip('ab') # sp|trim # 'a'.strip(none) # '\u200bx\u200b'.strip() # '\u3000x'.strip()
'5'.zfill(3) # '-5'.zfill(4) # 'ab'.ljust(4) # 'ab'.rjust(4, '.') # 'ab'.center(5) # 'ab'.center(6, '*') # 'a\tb'.expandtabs(4) # ', '.join(ls) # ''.join([]) # ','.join([1]) # '-'.join('abc')
'{} and {}'.format(1, 'b') # '{0}-{x}'.format('a', x=2) # '{:>5}|{:.2f}'.format('a', 1.239) # 'abc'.replace('b', 'x') # 'aaa'.replace('a', 'b', 2) # s.isalpha() # 'abc'.isalpha() # ''.isalpha() # '12'.isdigit() # ''.isdigit() # 'a1'.isalnum() # ' \n'.isspace() # ''.isspace() # 'AB c'.islower() # 'ab c'.islower() # 'AB 1'.isupper() # 'Ab Cd'.istitle() # 'a_1'.isidentifier() # '½'.isnumeric() # '½'.isdigit() # '²'.isdigit() # '²'.isdecimal() # 'é'.isascii() # 'a\n'.isprintable()
d.get('b') # d.get('z') # d.get('z', 'dflt') # d.keys()|list # d.values()|list # d.items()|list # d.items()|length # schema.items()|list # schema.keys()|list # d.copy() # d.pop('a') # d.update({'z': 1}) # l.append(4) # l.index(1) # l.count(1) # l.copy() # ls.index('zz') # (1.0).is_integer() # d.setdefault('b', 2)
s[0] # s[-1] # s[1:3] # s[::-1] # u[2] # l[-1] # l[5] # l[1:][0] # l[1:][-1] # l[:-1] # l[-2:] # l[::2] # l[1:]|last # l[1:]|length # l[1:] # l[3:1] # l[:10] # ls[-5:2] # s[10:20] # d['b'] # d['z'] # d.z # d.a[0] # i[0] # n.x # missing.x # missing['x'] # l.x # l['0'] # s.x
1 == true # 1 == 1.0 # 'a' == ['a'] # none == false # '' == none # missing == none # missing == missing2 # [1,2] == [1,2] # {'a': 1} == {'a': 1.0} # l[1:] == [1,2] # 'a' < 'b' # [1,2] < [1,3] # 1 < 2 < 3 # 3 > 2 >= 2 # 1 < 'a'
'a' in s # 'lo W' in s # 1 in l # 'b' in d # 'role' in m[0] # none in [none] # 'x' not in d # 'x' in missing # 'x' in none # 1 in 'abc' # not l0 # not missing # l0 or 'x' # s and i # n or missing or 'z' # (s if f) # s if missing else 'no'
1 + 2.0 # 7 / 2 # 8 / 2 # 7 // 2 # -7 // 2 # 7 % 3 # -7 % 3 # 2 ** 3 # 2 ** -1 # 2 ** 0.5 # -i # +i # 'a' + 'b' # l + [4] # 'ab' * 3 # [0] * 3 # 'a' ~ 1 ~ none ~ true ~ 1.0 # 'a' ~ missing # '' ~ l ~ d # 'a' + 1 # missing + 'a' # 1 / 0 # 7.5 // 2 # 1e20 # 10 ** 20
n # t # x # tiny # huge # l # ls # d # q # [q] # [u] # ["it's"] # ['a"b'] # ["a\"'b"] # ['\n\t\\\x7f\u200b'] # {'k': ls, 1: none} # m # l[1:] # d.items() # d.keys() # d.values() # (1, 'a') # (1,) # () # range(3) # range(0, 6, 2)|list # range(3, 0, -1)|list # dict(a=1, b='c') # namespace(a=1).a # missing # [missing] # 1.5e300 # 100000000000000000000 # -0.0 # [1.0, 1e-05]
'a' 'b' # 'a\tb\x41\u00e9\'"\d' # "\"" # 0x1f # 1_000 # 1e3 # True # None # {'a': 1,}['a'] # [1, 2,] # s | upper | lower # not true is defined # (i + 1) ** 2 # -2 ** 2 # i is defined and i > 2 # i if i else 2 if n else 3
""".replace("\n", " # ").split(" # ")

STATEMENTS = {
    "none and undefined loops": "{% for a in missing %}x{% else %}else{% endfor %}{% for a in [] %}x{% else %}e{% endfor %}",
    "loop variables": "{% for a in l %}{{ loop.index }}{{ loop.index0 }}{{ loop.revindex }}{{ loop.first }}{{ loop.last }}{{ loop.length }}{{ loop.cycle('x','y') }}{{ loop.previtem }}{{ loop.nextitem }}{{ loop.changed(a > 1) }};{% endfor %}",
    "loop filter": "{% for a in l if a > 1 %}{{ loop.index }}{{ a }}{{ loop.last }}{% endfor %}",
    "loop pairs": "{% for k, v in d.items() %}{{ k }}={{ v }};{% endfor %}{% for k, v in d|dictsort %}{{ k }}{% endfor %}{% for k in d %}{{ k }}{% endfor %}",
    "schema items": "{% for k, v in schema.items() %}{{ k }}={{ v }};{% endfor %}{{ schema['items']['type'] }}{{ schema.type }}",
    "break and continue": "{% for a in range(9) %}{% if a == 1 %}{% continue %}{% endif %}{% if a > 3 %}{% break %}{% endif %}{{ a }}{% endfor %}",
    "recursive loop": "{% for a in [[1, [2]], [3]] recursive %}{{ loop.depth }}{% if a is iterable %}({{ loop(a) }}){% else %}{{ a }}{% endif %}{% endfor %}",
    "scopes": "{% set a = 1 %}{% for b in l %}{% set a = b %}{{ a }}{% endfor %}{{ a }}{% if t %}{% set a = 9 %}{% endif %}{{ a }}{% with a = 5, c = 6 %}{{ a }}{{ c }}{% endwith %}{{ a }}",
    "namespace": "{% set ns = namespace(a=1, b=[]) %}{% for x in l %}{% set ns.a = ns.a + x %}{% set ns.b = ns.b + [x] %}{% endfor %}{{ ns.a }}{{ ns.b }}{{ ns.c }}{{ ns.b|length }}",
    "macros": "{% macro f(a, b='B', c=none) %}{{ a }}{{ b }}{{ c }}{{ varargs|length if varargs is defined }}{% endmacro %}{{ f(1) }}{{ f(1, c=3) }}{{ f('x', 'y', 'z') }}{{ f() }}",
    "macro result": "{% macro f(a) %}\n  <{{ a }}>\n{% endmacro %}{% set r = f(2)|trim %}{{ r }}{{ r|length }}{{ f(3) is string }}",
    "call block": "{% macro f() %}[{{ caller() }}]{% endmacro %}{% call f() %}in{% endcall %}",
    "recursive macro": "{% macro f(n) %}{{ n }}{% if n > 0 %}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(4) }}",
    "set block": "{% set b %} text {{ i }} {% endset %}[{{ b }}]{{ b|trim|length }}{{ b is string }}",
    "set pairs": "{% set a, b = 1, [2] %}{{ a }}{{ b }}{% set c = (1, 2) %}{{ c[1] }}",
    "filter block": "{% filter upper %}abc {{ s }}{% endfilter %}",
    "raw": "{% raw %}{{ not }} {% if %}{% endraw %}{# comment #}x",
    "trim blocks": "a\n{% if t %}\n  b\n{% endif %}\n  {% if t %} c {% endif %}\n\n{# note #}\nd\n   {{ s }}\n{%- if t %}\n e\n{%- endif -%}\n f\n\n",
    "plus sign": "a\n  {%+ if t %}b{% endif +%}\nc\n  {#+ k #}d",
    "crlf": "a\r\n{% if t %}\r\nb\r\n{% endif %}\r\n'{{ 'x\r\ny' }}'\r\n",
    "one newline is dropped": "text\n",
    "two newlines": "text\n\n",
    "generation": "{% for x in ls %}{% generation %}{{ x }}{% endgeneration %},{%- generation -%} y {%- endgeneration %}{% endfor %}",
    "joiner and cycler": "{% set j = joiner(', ') %}{% for x in l %}{{ j() }}{{ x }}{% endfor %}{% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.next() }}{{ c.current }}",
    "inline if": "{{ 'a' if missing }}|{{ 'a' if t else 'b' }}|{{ ('x' if f) is defined }}",
    "append is refused": "{% set x = [] %}{% set _ = x.append(1) %}{{ x }}",
    "raise": "{{ raise_exception('No ' ~ i) }}",
    "unknown filter": "{{ s|nope }}",
    "unknown test": "{{ s is nope }}",
    "unknown function": "{{ nope(1) }}",
    "unknown tag": "{% do l %}",
    "loop over none": "{% for a in n %}x{% endfor %}",
    "none has no length": "{{ n|length }}",
    "nested attributes": "{{ m[1].x.y }}{{ m[1]['x']['y'] }}{{ m[0].x is defined }}{{ m[0].x.y is defined if m[0].x is defined }}",
    "dict arguments": "{% set kw = {'a': 1} %}{{ dict(b=2, **kw) }}{{ dict([('x', 1)]) }}{{ dict(kw, c=3) }}",
    "adding dicts": "{{ dict(d, **{'z': 1})|length }}",
    "strings that look escaped": r"""{{ 'a\\n' }}{{ "\\" }}{{ '\\d' }}""",
    "strftime": "{{ strftime_now('%Y')|length }}{{ strftime_now('%d %B %Y, %H:%M') is string }}",
}

TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Weather of a city — now", "parameters": {
    "type": "object", "properties": {"city": {"type": "string", "description": "The city"},
                                     "days": {"type": "array", "items": {"type": "integer"}, "default": None}},
    "required": ["city"]}}}]
CALL = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome", "days": [1, 2]}}}]
TEXT_CALL = [{"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "{\"city\": \"Rome\"}"}}]
DIALOGUES = {
    "plain": [dict(role="user", content="Hi"), dict(role="assistant", content="Hello there."), dict(role="user", content="Bye"),
              dict(role="assistant", content="See you.")],
    "system": [dict(role="system", content="Be brief."), dict(role="user", content=" Hi \n"), dict(role="assistant", content="Yo")],
    "call": [dict(role="user", content="Weather in Rome?"), dict(role="assistant", content="Let me look.", tool_calls=CALL),
             dict(role="tool", content="18 C", name="weather"), dict(role="assistant", content="It is 18 C.")],
    "null content": [dict(role="user", content="Weather in Rome?"), dict(role="assistant", content=None, tool_calls=CALL),
                     dict(role="tool", content="18 C", name="weather", tool_call_id="call_1"),
                     dict(role="assistant", content="It is 18 C.", tool_calls=None)],
    "no content": [dict(role="user", content="Weather in Rome?"), dict(role="assistant", tool_calls=TEXT_CALL)],
    "empty content": [dict(role="user", content="Weather?", name="Ann"), dict(role="assistant", content="", tool_calls=CALL)],
    "reasoning": [dict(role="user", content="2+2?"), dict(role="assistant", content="4", reasoning_content="Two and two."),
                  dict(role="user", content="3+3?"), dict(role="assistant", content="6", thinking="Three and three.")],
    "inline thinking": [dict(role="user", content="2+2?"), dict(role="assistant", content="<think>\nTwo.\n</think>\n\n4")],
}
ARGUMENTS = {
    "": {},
    "tools": dict(tools=TOOLS),
    "documents": dict(documents=[{"title": "Rome", "text": "A city."}, {"title": "Oslo", "text": "Another."}]),
    "kwargs": dict(enable_thinking=False, custom_instructions="Short!"),
}

TEMPLATES = {
    "qwen2.5": """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] }}
    {%- else %}
        {{- 'You are a helpful assistant.' }}
    {%- endif %}
    {{- "\\n\\n# Tools\\n\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}
            {{- '\\n' + message.content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}
                {%- set tool_call = tool_call.function %}
            {%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' }}
            {{- tool_call.name }}
            {{- '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' }}
        {{- message.content }}
        {{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
""",
    "qwen3": """{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- else %}
            {%- if '</think>' in content %}
                {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
                {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
            {%- endif %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or (not loop.last and reasoning_content)) %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {%- if message.tool_calls %}
            {%- for tool_call in message.tool_calls %}
                {%- if (loop.first and content) or (not loop.first) %}{{- '\\n' }}{%- endif %}
                {%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}
                {{- '<tool_call>\\n{"name": "' + tool_call.name + '", "arguments": ' }}
                {%- if tool_call.arguments is string %}{{- tool_call.arguments }}{%- else %}{{- tool_call.arguments | tojson }}{%- endif %}
                {{- '}\\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}""",
    "llama3.1": """{{- bos_token }}
{%- if custom_tools is defined %}{%- set tools = custom_tools %}{%- endif %}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}{{- "Environment: ipython\\n" }}{%- endif %}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- if tools is not none %}
    {%- if messages | length != 0 %}
        {%- set first_user_message = messages[0]['content']|trim %}
        {%- set messages = messages[1:] %}
    {%- endif %}
    {{- '<|start_header_id|>user<|end_header_id|>\\n\\n' -}}
    {%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\\n\\n" }}{%- endfor %}
    {{- first_user_message + "<|eot_id|>"}}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}{{- raise_exception("This model only supports single tool-calls at once!") }}{%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
        {{- '{"name": "' + tool_call.name + '", ' }}{{- '"parameters": ' }}{{- tool_call.arguments | tojson }}{{- "}" }}{{- "<|eot_id|>" }}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}{{- message.content | tojson }}{%- else %}{{- message.content }}{%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
""",
    "mistral": """{%- set user_messages = messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace(count=0) %}
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}
                    {%- if val is string %}{{- '"' + key + '": "' + val + '"' }}{%- else %}{{- '"' + key + '": ' + val|tojson }}{%- endif %}
                    {%- if not loop.last %}{{- ", " }}{%- endif %}
                {%- endfor %}
                {{- "}}" }}{%- if not loop.last %}{{- ", " }}{%- else %}{{- "]" }}{%- endif %}
            {%- endfor %}
            {{- "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {{- "[INST] " + message["content"] + "[/INST]" }}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[TOOL_CALLS] [" }}
        {%- for tool_call in message.tool_calls %}
            {%- set out = tool_call.function|tojson %}
            {{- out[:-1] }}
            {%- if tool_call.id is defined %}{{- ', "id": "' + tool_call.id + '"}' }}{%- else %}{{- '}' }}{%- endif %}
        {%- endfor %}
        {{- "]" + eos_token }}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token }}
    {%- elif message["role"] == "tool" %}
        {%- if message.content is defined and message.content.content is defined %}{%- set content = message.content.content %}{%- else %}{%- set content = message.content %}{%- endif %}
        {{- '[TOOL_RESULTS] {"content": ' + content|string + "}[/TOOL_RESULTS]" }}
    {%- else %}
        {{- raise_exception("Only user, assistant and tool roles are supported, not " + message.role + ".") }}
    {%- endif %}
{%- endfor %}
""",
    "hermes": """{%- macro json_to_python_type(json_spec) %}
{%- set basic_type_map = {"string": "str", "number": "float", "integer": "int", "boolean": "bool"} %}
{%- if basic_type_map[json_spec.type] is defined %}
    {{- basic_type_map[json_spec.type] }}
{%- elif json_spec.type == "array" %}
    {{- "list[" +  json_to_python_type(json_spec['items']) + "]"}}
{%- elif json_spec.type == "object" %}
    {{- "dict" }}
{%- elif json_spec.type is iterable %}
    {{- "Union[" }}{%- for t in json_spec.type %}{{- json_to_python_type({"type": t}) }}{%- if not loop.last %}{{- "," }}{%- endif %}{%- endfor %}{{- "]" }}
{%- else %}
    {{- "Any" }}
{%- endif %}
{%- endmacro %}
{{- bos_token }}
{%- if tools is iterable and tools | length > 0 %}
{%- for tool in tools %}
    {%- if tool.function is defined %}{%- set tool = tool.function %}{%- endif %}
    {{- 'def ' + tool.name + '(' }}
    {%- for param_name, param_fields in tool.parameters.properties|items %}
        {{- param_name + ": " + json_to_python_type(param_fields) }}
        {%- if not loop.last %}{{- ", " }}{%- endif %}
    {%- endfor %}
    {{- ")" }}
    {{- " - " + tool.description + "\\n" }}
    {{- tool.parameters }}
{%- endfor %}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' ~ message.role ~ (' ' ~ message.name if message.name) ~ '\\n' ~ message.content ~ '<|im_end|>\\n' }}
{%- endfor %}""",
    "command-r": """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = 'You are a model.' %}{% endif %}
{{ '<|SYSTEM|>' }}{{ '# Preamble' }}
{{ '\\n' + system_message }}{% if custom_instructions is defined %}{{ custom_instructions }}{% endif %}
{%- if documents %}
{{- '\\n<results>' }}
{%- for document in documents %}{{ '\\nDocument: ' }}{{ loop.index0 }}
{% for key, value in document.items() %}
{{ key }}: {{value}}
{% endfor %}
{%- endfor %}
{{- '</results>' }}
{%- endif %}
{% for message in loop_messages %}
{% set content = message['content'] %}
{% if message['role'] == 'user' %}
{{ '<|USER|>' + content.strip() + '<|END|>' }}
{% elif message['role'] == 'assistant' %}
{{ '<|BOT|>'  + (content or '').strip() + '<|END|>' }}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<|BOT|>' }}{% endif %}
""",
    "gemma": """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '\\n\\n' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '\\n\\n' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- if (message['role'] == 'assistant') -%}
        {%- set role = "model" -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<start_of_turn>' + role + '\\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}{{ '<start_of_image>' }}{%- elif item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception("Invalid content type") }}
    {%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{'<start_of_turn>model\\n'}}{%- endif -%}
""",
    "deepseek-r1": """{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}{% set ns = namespace(is_first=false, is_tool=false, is_output_first=true, system_prompt='') %}{%- for message in messages %}{%- if message['role'] == 'system' %}{% set ns.system_prompt = message['content'] %}{%- endif %}{%- endfor %}{{bos_token}}{{ns.system_prompt}}{%- for message in messages %}{%- if message['role'] == 'user' %}{%- set ns.is_tool = false -%}{{'<|User|>' + message['content']}}{%- endif %}{%- if message['role'] == 'assistant' and message['content'] is none %}{%- set ns.is_tool = false -%}{%- for tool in message['tool_calls']%}{{'<|calls|>' + tool['type'] + '<|sep|>' + tool['function']['name'] + '\\n' + tool['function']['arguments']|tojson}}{%- endfor %}{%- endif %}{%- if message['role'] == 'assistant' and message['content'] is not none %}{% set content = message['content'] %}{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}{{'<|Assistant|>' + (content or '') + '<|eos|>'}}{%- endif %}{%- if message['role'] == 'tool' %}{%- set ns.is_tool = true -%}{{'<|output|>' + message['content'] + '<|end|>'}}{%- endif %}{%- endfor -%}{% if add_generation_prompt and not ns.is_tool %}{{'<|Assistant|><think>\\n'}}{% endif %}""",
    "nemotron": """{%- set ns = namespace(non_tool_response_message_list=[]) -%}
{% macro render_extra_keys(json_dict, handled_keys) %}
    {%- if json_dict is mapping %}
        {%- for json_key in json_dict if json_key not in handled_keys %}
            {%- if json_dict[json_key] is mapping or (json_dict[json_key] is sequence and json_dict[json_key] is not string) %}
                {{- '\\n<' ~ json_key ~ '>' ~ (json_dict[json_key] | tojson | safe) ~ '</' ~ json_key ~ '>' }}
            {%- else %}
                {{-'\\n<' ~ json_key ~ '>' ~ (json_dict[json_key] | string) ~ '</' ~ json_key ~ '>' }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
{% endmacro %}
{%- set enable_thinking = enable_thinking if enable_thinking is defined else True %}
{%- set tools = tools if tools is defined else [] %}
{{- "<|im_start|>system\\n" }}
{%- if tools is iterable and tools | length > 0 %}
    {{- "# Tools\\n<tools>" }}
    {%- for tool in tools %}
        {%- if tool.function is defined %}{%- set tool = tool.function %}{%- endif %}
        {{- "\\n<function>\\n<name>" ~ tool.name ~ "</name>" }}
        {%- if tool.description is defined %}{{- '\\n<description>' ~ (tool.description | trim) ~ '</description>' }}{%- endif %}
        {%- if tool.parameters is defined and tool.parameters is mapping and tool.parameters.properties is defined and tool.parameters.properties is mapping %}
            {%- for param_name, param_fields in tool.parameters.properties|items %}
                {{- '\\n<parameter>\\n<name>' ~ param_name ~ '</name>' }}
                {%- if param_fields.type is defined %}{{- '\\n<type>' ~ (param_fields.type | string) ~ '</type>' }}{%- endif %}
                {%- set handled_keys = ['name', 'type', 'description', 'enum', 'required'] %}
                {{- render_extra_keys(param_fields, handled_keys) }}
                {{- '\\n</parameter>' }}
            {%- endfor %}
        {%- endif %}
        {{- render_extra_keys(tool.parameters, ['type', 'properties', 'required']) }}
        {{- '\\n</function>' }}
    {%- endfor %}
    {{- "\\n</tools>" }}
{%- endif %}
{{- "<|im_end|>\\n" }}
{%- for message in messages %}
    {%- if message.role == "assistant" and message.tool_calls is defined and message.tool_calls is iterable and message.tool_calls | length > 0 %}
        {%- set content = message.content | default('', true) %}
        {{- '<|im_start|>assistant\\n' ~ (content | trim) }}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '<tool_call>\\n<function=' ~ tool_call.name ~ '>\\n' -}}
            {%- if tool_call.arguments is defined and tool_call.arguments is mapping %}
                {%- for args_name, args_value in tool_call.arguments|items %}
                    {{- '<parameter=' ~ args_name ~ '>\\n' -}}
                    {%- set args_value = args_value | tojson | safe if args_value is mapping or (args_value is sequence and args_value is not string) else args_value | string %}
                    {{- args_value ~ '\\n</parameter>\\n' -}}
                {%- endfor %}
            {%- endif %}
            {{- '</function>\\n</tool_call>\\n' -}}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content | string %}
        {%- if message.reasoning_content is defined and message.reasoning_content is string and message.reasoning_content | trim | length > 0 %}
            {%- set content = "<think>\\n" ~ message.reasoning_content ~ "\\n</think>\\n" ~ (message.content | default('', true)) %}
        {%- elif '<think>' not in content and '</think>' not in content %}
            {%- set content = "<think></think>" ~ content %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' ~ (content | trim) ~ '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' ~ message.role ~ '\\n' ~ (message.content | string) ~ '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {%- if enable_thinking %}{{- '<|im_start|>assistant\\n<think>\\n' }}{%- else %}{{- '<|im_start|>assistant\\n<think></think>' }}{%- endif %}
{%- endif %}""",
    "granite": """{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content'] %}{%- set loop_messages = messages[1:] %}
{%- else %}{%- set system_message = "Knowledge Cutoff Date: April 2024." %}
{%- if tools and documents %}{%- set system_message = system_message + " Both." %}{%- elif tools %}{%- set system_message = system_message + " Tools." %}{%- elif documents %}{%- set system_message = system_message + " Documents." %}{%- endif %}
{%- if 'citations' in controls and documents %}{%- set system_message = system_message + " Cite." %}{%- endif %}
{%- set loop_messages = messages %}
{%- endif %}
{{- '<|start_of_role|>system<|end_of_role|>' + system_message + '<|end_of_text|>\\n' }}
{%- if tools %}{{- '<|start_of_role|>tools<|end_of_role|>' }}{{- tools | tojson(indent=4) }}{{- '<|end_of_text|>\\n' }}{%- endif %}
{%- if documents %}{%- for document in documents %}{{- 'Document ' + loop.index0 | string + '\\n' + document['text'] }}{%- if not loop.last %}{{- '\\n\\n'}}{%- endif%}{%- endfor %}{%- endif %}
{%- for message in loop_messages %}
{{- '<|start_of_role|>' + message['role'] + '<|end_of_role|>' + (message['content'] | default('') ) + '<|end_of_text|>\\n' }}
{%- if loop.last and add_generation_prompt %}{{- '<|start_of_role|>assistant' }}{%- if controls %}{{- ' ' + controls | tojson()}}{%- endif %}{{- '<|end_of_role|>' }}{%- endif %}
{%- endfor %}""",
    "gpt-oss": """{%- macro render_type(spec, is_nullable=false) -%}
    {%- if spec.type == "array" -%}{%- if spec['items'] -%}{%- if spec['items']['type'] == "integer" -%}{{- "number[]" }}{%- else -%}{{- render_type(spec['items']) + '[]' }}{%- endif -%}{%- else -%}{{- "any[]" }}{%- endif -%}
    {%- elif spec.type is defined and spec.type is iterable and spec.type is not string and spec.type is not mapping and spec.type[0] is defined -%}{%- if spec.type | length > 1 %}{{- spec.type | join(" | ") }}{%- else %}{{- spec.type[0] }}{%- endif %}
    {%- elif spec.type == "string" -%}{%- if spec.enum -%}{{- '"' + spec.enum|join('" | "') + '"' -}}{%- else -%}{{- "string" }}{%- endif -%}
    {%- else -%}{{- "any" }}{%- endif -%}
{%- endmacro -%}
{%- macro render_tools(tools) -%}
    {%- for tool in tools -%}
        {%- set tool = tool.function -%}
        {{- "// " + tool.description + "\\n" }}{{- "type "+ tool.name + " = " }}
        {%- if tool.parameters and tool.parameters.properties %}
            {{- "(_: {\\n" }}
            {%- for param_name, param_spec in tool.parameters.properties.items() %}
                {%- if param_spec.description %}{{- "// " + param_spec.description + "\\n" }}{%- endif %}
                {{- param_name }}{%- if param_name not in (tool.parameters.required or []) -%}{{- "?" }}{%- endif -%}
                {{- ": " }}{{- render_type(param_spec) }}
                {%- if param_spec.default is defined -%}{%- if param_spec.enum %}{{- ", // default: " + param_spec.default }}{%- elif param_spec.oneOf %}{{- "// default: " + param_spec.default }}{%- else %}{{- ", // default: " + param_spec.default|tojson }}{%- endif -%}{%- endif -%}
                {%- if not loop.last %}{{- ",\\n" }}{%- else %}{{- ",\\n" }}{%- endif -%}
            {%- endfor %}
            {{- "}) => any;\\n\\n" }}
        {%- else -%}{{- "() => any;\\n\\n" }}{%- endif -%}
    {%- endfor %}
{%- endmacro -%}
{%- set has_tools = tools is not none and tools|length > 0 %}
{{- "<|start|>system<|message|>" }}{%- if reasoning_effort is not defined %}{%- set reasoning_effort = "medium" %}{%- endif %}{{- "Reasoning: " + reasoning_effort + "<|end|>" }}
{%- if has_tools %}{{- "<|start|>developer<|message|>" }}{{- render_tools(tools) }}{{- "<|end|>" }}{%- endif %}
{%- set last_tool_call = namespace(name=none) %}
{%- for message in messages -%}
    {%- if message.role == 'assistant' -%}
        {%- if "content" in message and "<|channel|>analysis<|message|>" in message.content %}{{- raise_exception("You have passed a message containing <|channel|> tags in the content field.") }}{%- endif %}
        {%- if "tool_calls" in message %}
            {%- set future_final_message = namespace(found=false) %}
            {%- for future_message in loop.nextitem if loop.nextitem is iterable %}{%- endfor %}
            {%- if message.content and message.thinking %}{{- raise_exception("Cannot pass both content and thinking in an assistant message with tool calls!") }}{%- elif message.content %}{{- "<|start|>assistant<|channel|>analysis<|message|>" + message.content + "<|end|>" }}{%- endif %}
            {%- set tool_call = message.tool_calls[0] %}{%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- "<|start|>assistant to=" }}{{- "functions." + tool_call.name + "<|channel|>commentary " }}{{- (tool_call.content_type if tool_call.content_type is defined else "json") + "<|message|>" }}{{- tool_call.arguments|tojson }}{{- "<|call|>" }}
            {%- set last_tool_call.name = tool_call.name %}
        {%- elif loop.last and not add_generation_prompt %}
            {%- if "thinking" in message %}{{- "<|start|>assistant<|channel|>analysis<|message|>" + message.thinking + "<|end|>" }}{%- endif %}
            {{- "<|start|>assistant<|channel|>final<|message|>" + message.content + "<|return|>" }}
        {%- else %}{{- "<|start|>assistant<|channel|>final<|message|>" + message.content + "<|end|>" }}{%- set last_tool_call.name = none %}{%- endif %}
    {%- elif message.role == 'tool' -%}
        {%- if last_tool_call.name is none %}{{- raise_exception("Message has tool role, but there was no previous assistant message with a tool call!") }}{%- endif %}
        {{- "<|start|>functions." + last_tool_call.name }}{{- " to=assistant<|channel|>commentary<|message|>" + message.content|tojson + "<|end|>" }}
    {%- elif message.role == 'user' -%}{{- "<|start|>user<|message|>" + message.content + "<|end|>" }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|start|>assistant{%- endif -%}""",
    "key by key": """{% for message in messages %}{% for key, value in message.items() %}{{ key }}={{ value }};{% endfor %}
{% endfor %}{{ messages[0] | tojson }}{{ tools }}{{ documents is none }}{{ enable_thinking }}""",
}


def outcome(make):
    """The text, or the error's text where jinja2 or the template refuses."""
    try:
        return dict(text=make())
    except Exception as error:  # jinja2 lets Python's own errors through
        return dict(error=f"{type(error).__name__}: {error}")


def snippet(template):
    return outcome(lambda: _compile_jinja_template(template).render(**VALUES))


def dialogue(template, messages, arguments, add):
    # As apply_chat_template does first: a key whose value is None is no key.
    messages = [{k: v for k, v in message.items() if v is not None} for message in messages]
    return outcome(lambda: render_jinja_template([messages], chat_template=template, add_generation_prompt=add, bos_token="<s>",
                                                 eos_token="</s>", **arguments)[0][0])


expressions = [e.strip() for e in EXPRESSIONS if e.strip()]
snippets = [dict(template="{{ " + e + " }}", **snippet("{{ " + e + " }}")) for e in dict.fromkeys(expressions)]
snippets += [dict(template=t, name=name, **snippet(t)) for name, t in STATEMENTS.items()]
# The address of an object in a text is no fact about the language.
snippets = [s for s in snippets if " at 0x" not in s.get("text", "")]
dialogues = []
for template_name, template in TEMPLATES.items():
    for dialogue_name, messages in DIALOGUES.items():
        for arguments_name, arguments in ARGUMENTS.items():
            for add in ((False, True) if arguments_name in ("", "tools") else (True,) if dialogue_name in ("plain", "call") else ()):
                dialogues.append(dict(template=template_name, dialogue=dialogue_name, arguments=arguments_name, add=add,
                                      **dialogue(template, messages, arguments, add)))
versions = dict(transformers=transformers.__version__, jinja2=jinja2.__version__)
out = dict(versions=versions, values=VALUES, snippets=snippets, templates=TEMPLATES, inputs=DIALOGUES, arguments=ARGUMENTS,
           dialogues=dialogues)
HERE.with_suffix(".json").write_text(json.dumps(out, indent=1, ensure_ascii=False) + "\n")
