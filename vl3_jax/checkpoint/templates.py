"""Jinja chat templates of exported checkpoints. This package renders prompts in Python and never runs them.

Both follow the strings that the weights were trained on; see `vl3_jax/processing/chat_template.py`. In the native
layout the processor writes the frame times, in the official layout the template does.
"""

_HEAD = """\
{%- for message in messages -%}
"""

NATIVE = (
    _HEAD
    + """\
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part is string -%}
{{- part -}}
{%- elif part['type'] == 'image' -%}
{{- '<|image_pad|>\\n' -}}
{%- elif part['type'] == 'video' -%}
{{- '<|video_pad|>\\n' -}}
{%- else -%}
{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
)

OFFICIAL = (
    """\
{%- if add_system_prompt and messages and messages[0]['role'] != 'system' -%}
{{- '<|im_start|>system\\nYou are VideoLLaMA3 created by Alibaba DAMO Academy, a helpful assistant to help people \
understand images and videos.<|im_end|>\\n' -}}
{%- endif -%}
"""
    + _HEAD
    + """\
{%- set stream = message['role'] == 'stream' -%}
{{- ('<|stream_start|>' if stream else '<|im_start|>') + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part is string -%}
{{- part -}}
{%- elif part['type'] == 'image' -%}
{%- if 'timestamp' in part -%}
{{- 'Time ' + ((part['timestamp'] | float) | round(1) | string) + 's: ' -}}
{%- endif -%}
{{- '<image>\\n' -}}
{%- elif part['type'] == 'video' -%}
{%- for index in range(part['num_frames']) -%}
{%- if 'timestamps' in part -%}
{{- 'Time ' + ((part['timestamps'][index] | float) | round(1) | string) + 's:' -}}
{%- endif -%}
{{- '<image>' + ('\\n' if loop.last else ',') -}}
{%- endfor -%}
{%- else -%}
{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|stream_end|>' if stream else '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
)
