"""Dialogues rendered by transformers' own chat template function, with templates in the manner of three families.

The ChatML one has the text that SmolLM2's GGUF carries (a default system prompt); the other two are written for this
test in the manner of Llama 2 and Llama 3. Writes chat_template.json. Nothing is random.
Printed with transformers 5.23.0, jinja2 3.1.6.
"""
import json
import pathlib

import jinja2
import transformers
from transformers.utils.chat_template_utils import render_jinja_template

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {{- "tools: " + (tools | tojson) }}
{%- endif %}
{{- system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
LLAMA2 = """{% if messages[0]['role'] == 'system' %}
    {% set loop_messages = messages[1:] %}
    {% set system_message = '<<SYS>>\\n' + messages[0]['content'].strip() + '\\n<</SYS>>\\n\\n' %}
{% else %}
    {% set loop_messages = messages %}
    {% set system_message = '' %}
{% endif %}
{% set ns = namespace(turns=0) %}
{% for message in loop_messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Roles must alternate user/assistant') }}
    {% endif %}
    {% if message['role'] == 'user' %}
        {% set ns.turns = ns.turns + 1 %}
{{ bos_token + '[INST] ' + (system_message if loop.first else '') + message['content'].strip() + ' [/INST]' }}
    {% elif message['role'] == 'assistant' %}
{% generation %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endgeneration %}
    {% endif %}
{% endfor %}
turns={{ ns.turns }}
"""
DIALOGUES = {
    "user": [("user", "Hello, Ünï  ✓\n")],
    "system": [("system", " Be brief. "), ("user", "<b>1 & 2</b>")],
    "turns": [("user", "one "), ("assistant", " two"), ("user", "'three'")],
    "wrong": [("assistant", "I begin"), ("user", "no")],
}
TEMPLATES = dict(chatml=(CHATML, "<|im_start|>", "<|im_end|>"), llama3=(LLAMA3, "<|begin_of_text|>", "<|eot_id|>"),
                 llama2=(LLAMA2, "<s>", "</s>"))

cases = []
for template_name, (template, bos, eos) in TEMPLATES.items():
    for dialogue_name, turns in DIALOGUES.items():
        for add in (False, True):
            messages = [dict(role=role, content=content) for role, content in turns]
            case = dict(name=f"{template_name}/{dialogue_name}/{add}", template=template, messages=messages,
                        add_generation_prompt=add, bos_token=bos, eos_token=eos)
            try:
                texts, _ = render_jinja_template([messages], chat_template=template, add_generation_prompt=add,
                                                 bos_token=bos, eos_token=eos)
                case["text"] = texts[0]
            except jinja2.exceptions.TemplateError as error:
                case["error"] = str(error)
            cases.append(case)
versions = dict(transformers=transformers.__version__, jinja2=jinja2.__version__)
out = pathlib.Path(__file__).with_suffix(".json")
out.write_text(json.dumps(dict(versions=versions, cases=cases), indent=1, ensure_ascii=False) + "\n")
