"""Dialogues in the chat formats of twelve published model families, rendered by transformers.

The templates are written for this test: each reproduces the text that the family's models were tuned on (as their model
cards describe it), with the constructs their own templates use: refused roles, a system prompt folded into a user turn,
a date, tools as JSON, thoughts cut from earlier turns, loop controls, namespaces, macros, Python's string methods.
Writes chat_styles.json. Nothing is random. Printed with the versions that the file names.
"""
import json
import pathlib

import jinja2
import transformers
from transformers.utils.chat_template_utils import render_jinja_template

STYLES = {}
STYLES["chatml"] = ("", "<|im_end|>", """{%- if messages[0].role != 'system' %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}""")
STYLES["llama-2"] = ("<s>", "</s>", """{%- set offset = 1 if messages[0]['role'] == 'system' else 0 -%}
{%- for message in messages[offset:] -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') -}}
    {%- endif -%}
    {%- if message['role'] == 'user' -%}
        {{- bos_token ~ '[INST] ' -}}
        {%- if loop.first and offset -%}
            {{- '<<SYS>>\\n' ~ messages[0]['content'].strip() ~ '\\n<</SYS>>\\n\\n' -}}
        {%- endif -%}
        {{- message['content'].strip() ~ ' [/INST]' -}}
    {%- else -%}
        {{- ' ' ~ message['content'].strip() ~ ' ' ~ eos_token -}}
    {%- endif -%}
{%- endfor -%}""")
STYLES["llama-3"] = ("<|begin_of_text|>", "<|eot_id|>", """{%- for message in messages %}
    {%- set content = '<|start_header_id|>' ~ message.role ~ '<|end_header_id|>\\n\\n' ~ message.content | trim ~ '<|eot_id|>' %}
    {%- if loop.index0 == 0 %}{% set content = bos_token ~ content %}{% endif %}
    {{- content }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}""")
STYLES["llama-3.1"] = ("<|begin_of_text|>", "<|eot_id|>", """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" ~ tools | tojson(indent=4) }}
{%- endif %}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Letters of the date: " ~ date_string | length ~ "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
""")
STYLES["mistral-v3"] = ("<s>", "</s>", """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages if message.role in ["user", "assistant"] %}
    {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
        {{- raise_exception("After the optional system message, conversation roles must alternate user/assistant/...") }}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported, with the exception of an initial optional system message!") }}
    {%- endif %}
{%- endfor %}""")
STYLES["gemma"] = ("<bos>", "<eos>", """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for message in messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor -%}
{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}""")
STYLES["phi-3"] = ("<s>", "<|endoftext|>", """{% for message in messages %}
{% if message['role'] == 'system' and message['content'] %}
{{'<|system|>\\n' + message['content'] + '<|end|>\\n'}}{% elif message['role'] == 'user' %}
{{'<|user|>\\n' + message['content'] + '<|end|>\\n'}}{% elif message['role'] == 'assistant' %}
{{'<|assistant|>\\n' + message['content'] + '<|end|>\\n'}}{% endif %}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|assistant|>\\n' }}{% else %}
{{ eos_token }}{% endif %}""")
STYLES["zephyr"] = ("<s>", "</s>", """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}""")
STYLES["vicuna"] = ("<s>", "</s>", """{{- bos_token }}
{%- set intro = "A chat between a curious user and an artificial intelligence assistant. " ~
    "The assistant gives helpful, detailed, and polite answers to the user's questions." %}
{%- for message in messages %}
    {%- if loop.first %}
        {%- if message.role == 'system' %}{{ message.content.strip() ~ ' ' }}{% continue %}{% endif %}
        {{- intro ~ ' ' }}
    {%- endif %}
    {%- if message.role == 'user' %}{{ 'USER: ' ~ message.content.strip() ~ ' ' }}
    {%- elif message.role == 'assistant' %}{{ 'ASSISTANT: ' ~ message.content.strip() ~ eos_token }}
    {%- else %}{{ raise_exception("Unknown role: " ~ message.role) }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}""")
STYLES["alpaca"] = ("<s>", "</s>", """{% macro block(title, body) -%}
### {{ title }}:
{{ body | trim }}

{% endmacro -%}
{%- for message in messages -%}
{%- if message.role == 'system' -%}{{ message.content + '\\n\\n' }}
{%- elif message.role == 'user' -%}{{ block('Instruction', message.content) }}
{%- else -%}{{ block('Response', message.content)[:-1] + eos_token }}{{ '\\n\\n' if not loop.last }}
{%- endif -%}
{%- endfor -%}
{{ '### Response:\\n' if add_generation_prompt }}""")
# Thoughts are cut from the answers before the last question, found from the end.
STYLES["qwen3"] = ("", "<|im_end|>", """{%- set ns = namespace(last=messages|length - 1, seeking=true) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.seeking and message.role == "user" and message.content is string and not message.content.startswith('<tool_response>') %}
        {%- set ns.seeking = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "assistant" %}
        {%- set content = message.content %}
        {%- set thoughts = '' %}
        {%- if '</think>' in content %}
            {%- set thoughts = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last and thoughts %}
            {{- '<think>\\n' + thoughts.strip('\\n') + '\\n</think>\\n\\n' }}
        {%- endif %}
        {%- generation %}{{- content + '<|im_end|>\\n' }}{%- endgeneration %}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}""")
STYLES["deepseek"] = ("<|begin|>", "<|end|>", """{%- set ns = namespace(system='', first=true) -%}
{%- for message in messages -%}
    {%- if message['role'] != 'system' -%}{%- break -%}{%- endif -%}
    {%- set ns.system = ns.system ~ message['content'] -%}
{%- endfor -%}
{{ bos_token }}{{ ns.system ~ '\\n\\n' if ns.system }}
{%- for message in messages -%}
    {%- if message['role'] == 'system' -%}{%- continue -%}{%- endif -%}
    {%- if message['role'] == 'user' -%}{{ 'User: ' ~ message['content'] ~ '\\n\\n' }}
    {%- else -%}{{ 'Assistant: ' ~ message['content'] ~ eos_token }}{%- endif -%}
{%- endfor -%}
{%- for key, value in {'a': 1, 'b': [1, 2.5, none, true, 'é"<']}.items() %}{{ key }}={{ value | tojson }};{% endfor -%}
{{ 'Assistant:' if add_generation_prompt }}""")

U, A, S = "user", "assistant", "system"
DIALOGUES = {
    "one": [(U, "Hello, Ünï ✓ <b>1 & 2</b>\n")],
    "system": [(S, " Be brief. "), (U, "'q' \"r\"")],
    "turns": [(U, "one "), (A, "<think>\nhm\n</think>\n\n two"), (U, "three"), (A, "<think>\nso\n</think>\n\nfour\n")],
    "all": [(S, "s"), (U, "天空"), (A, "蓝色。"), (U, "?")],
    "wrong": [(A, "I begin"), (U, "no")],
}
cases = []
for style, (bos, eos, template) in STYLES.items():
    for name, turns in DIALOGUES.items():
        for add in (False, True):
            messages = [dict(role=role, content=content) for role, content in turns]
            case = dict(style=style, dialogue=name, add_generation_prompt=add)
            try:
                texts, _ = render_jinja_template([messages], chat_template=template, add_generation_prompt=add,
                                                 bos_token=bos, eos_token=eos)
                case["text"] = texts[0]
            except jinja2.exceptions.TemplateError as error:
                case["error"] = str(error)
            cases.append(case)
out = pathlib.Path(__file__).with_suffix(".json")
out.write_text(json.dumps(dict(
    versions=dict(transformers=transformers.__version__, jinja2=jinja2.__version__),
    styles={style: dict(bos=bos, eos=eos, template=template) for style, (bos, eos, template) in STYLES.items()},
    dialogues={name: [dict(role=r, content=c) for r, c in turns] for name, turns in DIALOGUES.items()},
    cases=cases), indent=0, ensure_ascii=False) + "\n")
print(len(cases), "cases", sum("error" in case for case in cases), "refused")
