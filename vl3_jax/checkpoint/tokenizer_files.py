"""Special tokens and chat templates that an exported checkpoint needs in its tokenizer files.

The Jinja templates follow the strings that the weights were trained on; this package renders prompts in Python and
never runs them. In the native layout the processor writes the frame times, in the official layout the template does.
"""

import json
import pathlib
import string
from collections.abc import Iterable, Sequence
from typing import Any

from vl3_jax.errors import InputError
from vl3_jax.json_file import JsonObject, read_object
from vl3_jax.model.config import ModelConfig

OFFICIAL_IMAGE = "<image>"
OFFICIAL_TOKENS = (OFFICIAL_IMAGE, "<|stream_start|>", "<|stream_end|>")
NATIVE_IMAGE, NATIVE_VIDEO = "<|image_pad|>", "<|video_pad|>"
_END_OF_TURN, _END_OF_TEXT = "<|im_end|>", "<|endoftext|>"

_TEMPLATE = string.Template("""\
{%- for message in messages -%}
$start
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part is string -%}
{{- part -}}
{%- elif part['type'] == 'image' -%}
$image
{%- elif part['type'] == 'video' -%}
$video
{%- else -%}
{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
$end
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
""")

NATIVE_TEMPLATE = _TEMPLATE.substitute(
    start="{{- '<|im_start|>' + message['role'] + '\\n' -}}",
    image="{{- '<|image_pad|>\\n' -}}",
    video="{{- '<|video_pad|>\\n' -}}",
    end="{{- '<|im_end|>\\n' -}}",
)

_DEFAULT_SYSTEM_PROMPT = """\
{%- if add_system_prompt and messages and messages[0]['role'] != 'system' -%}
{{- '<|im_start|>system\\nYou are VideoLLaMA3 created by Alibaba DAMO Academy, a helpful assistant to help people \
understand images and videos.<|im_end|>\\n' -}}
{%- endif -%}
"""
OFFICIAL_TEMPLATE = _DEFAULT_SYSTEM_PROMPT + _TEMPLATE.substitute(
    start="""\
{%- set stream = message['role'] == 'stream' -%}
{{- ('<|stream_start|>' if stream else '<|im_start|>') + message['role'] + '\\n' -}}""",
    image="""\
{%- if 'timestamp' in part -%}
{{- 'Time ' + ((part['timestamp'] | float) | round(1) | string) + 's: ' -}}
{%- endif -%}
{{- '<image>\\n' -}}""",
    video="""\
{%- for index in range(part['num_frames']) -%}
{%- if 'timestamps' in part -%}
{{- 'Time ' + ((part['timestamps'][index] | float) | round(1) | string) + 's:' -}}
{%- endif -%}
{{- '<image>' + ('\\n' if loop.last else ',') -}}
{%- endfor -%}""",
    end="{{- '<|stream_end|>' if stream else '<|im_end|>\\n' -}}",
)


def added_tokens(files: pathlib.Path) -> dict[str, int]:
    """Returns the ids of the added tokens by their text, from the tokenizer files that are in `files`."""
    return _token_ids(files)[0]


def _token_ids(files: pathlib.Path) -> tuple[dict[str, int], Iterable[int]]:
    """Returns the ids of the added tokens by their text, and those of the other tokens."""
    tokenizer, by_name = read_object(files / "tokenizer.json"), read_object(files / "added_tokens.json")
    decoder = read_object(files / "tokenizer_config.json").section("added_tokens_decoder")
    if unusual := [key for key in decoder if not (key.isascii() and key.isdigit() and len(key) < 10)]:
        raise decoder.error(unusual[0], "expected a token id as its key")
    added = {
        **{name: by_name.integer(name, -1) for name in by_name},
        **{decoder.section(key).text("content", ""): int(key) for key in decoder},
        **{token.text("content", ""): token.integer("id", -1) for token in tokenizer.sections("added_tokens")},
    }
    model = tokenizer.section("model")
    if isinstance(model.get("vocab"), list):  # a unigram model
        return added, range(len(model["vocab"]))
    vocabulary = model.section("vocab") or read_object(files / "vocab.json")
    if unusual := [name for name, i in vocabulary.items() if type(i) is not int]:
        raise vocabulary.error(unusual[0], "expected a token id")
    return added, vocabulary.values()


def check_token_ids(files: pathlib.Path, config: ModelConfig) -> None:
    """Raises InputError if the tokenizer in `files` has ids beyond the embedding table."""
    added, others = _token_ids(files)
    largest, rows = max([*added.values(), *others], default=-1), config.text.vocab_size
    if largest >= rows:
        raise InputError(
            f"{files}: its tokenizer has the token id {largest}, and the embedding table has {rows} rows; take the "
            "tokenizer that belongs to the weights, or enlarge the table: `resize_token_embeddings` of transformers"
        )


def add_tokens(files: pathlib.Path, tokens: Sequence[str]) -> tuple[dict[str, int], dict[str, bytes]]:
    """Adds special tokens to a tokenizer.

    Existing tokens keep their ids; missing ones get the next free ids in their order. Without a vocabulary nothing is
    added.

    Args:
      files: Folder with the tokenizer files, which are not changed.
      tokens: The tokens.

    Returns:
      The ids of all added tokens by their text, and the new content of the files that change, by name.
    """
    known, others = _token_ids(files)
    if not any((files / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        return known, {}
    missing = [name for name in tokens if name not in known]
    next_id = max([*known.values(), *others], default=-1) + 1
    new = {name: i for i, name in enumerate(missing, start=next_id)}
    ids, changed = known | new, {}
    for name in ("tokenizer.json", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"):
        if new and (files / name).is_file():
            content = read_object(files / name)
            _add(name, content, new)
            changed[name] = dump(content)
    return ids, changed


def end_token_files(files: pathlib.Path) -> dict[str, bytes]:
    """Returns the files that give transformers the end tokens, by name, for those that are missing in `files`."""
    ids = added_tokens(files)
    if not {_END_OF_TURN, _END_OF_TEXT} <= set(ids):
        return {}
    contents = {
        "generation_config.json": {
            "eos_token_id": [ids[_END_OF_TURN], ids[_END_OF_TEXT]],
            "pad_token_id": ids[_END_OF_TEXT],
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": _END_OF_TURN,
            "pad_token": _END_OF_TEXT,
        },
    }
    return {name: dump(content) for name, content in contents.items() if not (files / name).is_file()}


def _add(file: str, content: JsonObject, new: dict[str, int]) -> None:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    if file == "tokenizer.json":
        added = [{"id": i, "content": name, **flags} for name, i in new.items()]
        content["added_tokens"] = [*content.sections("added_tokens"), *added]
    elif file == "tokenizer_config.json":
        added = {str(i): {"content": name, **flags} for name, i in new.items()}
        content["added_tokens_decoder"] = {**content.section("added_tokens_decoder"), **added}
    elif file == "added_tokens.json":
        content |= new
    if file.startswith(("tokenizer_config", "special")) and isinstance(content.get("additional_special_tokens"), list):
        content["additional_special_tokens"].extend(new)


def dump(content: Any) -> bytes:
    """Serialises JSON with the indentation of Hugging Face files."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
