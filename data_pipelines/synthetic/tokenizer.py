"""The small tokenizer of nano: byte-level BPE with about a thousand entries.

It has Qwen2.5's normaliser and split pattern (each digit is a token) and is trained on the questions and answers of the
tasks in the layout of the chat template. It encodes any text, other languages byte by byte. The special tokens come
last, as in Qwen2.5.
"""

import pathlib
from collections.abc import Iterator

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from data_pipelines.synthetic.registry import TASKS, examples
from vl3_jax.processing import chat_template
from vl3_jax.processing.tokenizer import (
    END_OF_TEXT,
    IM_END,
    IM_START,
    IMAGE,
    IMAGE_PAD,
    STREAM_END,
    STREAM_START,
    VIDEO_PAD,
)

TOKENIZER = pathlib.Path(__file__).parent / "tokenizer.json"  # written by `train_tokenizer().save`
SIZE = 1024  # special tokens included
SPECIAL_TOKENS = (
    END_OF_TEXT,
    IM_START,
    IM_END,
    "<|vision_start|>",
    "<|vision_end|>",
    IMAGE_PAD,
    VIDEO_PAD,
    IMAGE,
    STREAM_START,
    STREAM_END,
)
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)
_SAMPLES = 250  # per task
_MAX_SECOND = 180  # time labels of the seconds below it are part of the texts
_SYSTEM_PROMPTS = 20  # repetitions, enough for its words to become tokens
# The words of the tasks do not fill the vocabulary; everyday words are added, so that they are not split into letters.
_EVERYDAY = """
about above after again air all also always am an and animal another any are arm around as ask away baby back bad be
beach because bed been before begin behind being below beside best better between bicycle big bird black board boat
body book both box boy bread bring brown building bus but buy by call came can car carry cat chair change child
children city clean clear close cloud coffee cold come could country cup cut dark day did different dinner do does dog
done door down draw dress drink drive during each ear early earth eat end enough even ever every example eye face fall
family far fast father feel few field find fire fish floor flower fly food foot for found four friend from front full
game garden gave get girl give glass go going gold good grass great green ground group grow had hair half hand happen
happy hard has hat have he head hear her here high him his hold home horse hot hour house how if important in inside
into is it its just keep kind kitchen know lady land large last laugh learn leave leg less let letter life light like
line list listen little live long look made make man mean men milk moment money moon more morning most mother mountain
mouth move movie much music must my near need never next nice night no nose not now object of off often old on once
only open or orange other our out outside over own page paint paper park part people person phone photo piece plant
plate play please point put question quick rain read ready really river road rock room round run said same saw say
school sea second see seem she ship shoe shop short should show side sign sing sit size sky sleep small smile snow so
some something song soon sound speak stand start stay stone stop story street strong summer sun sure swim table take
talk tall tell ten text than that the their them then there these they thing think three through time tired to today
together too took town train tree true try turn two under until up upon us use very video voice wait walk wall want
warm was wash watch water way wear weather week well went were what wheel when where which while who whole why wide
wife wild will wind window winter with without woman wood word work world would write year yes you young your
"""


def train_tokenizer() -> tokenizers.Tokenizer:
    """Trains the tokenizer, the same one at each call."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(SPLIT_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE - len(SPECIAL_TOKENS),
        min_frequency=2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    tokenizer.add_special_tokens([tokenizers.AddedToken(name, normalized=False) for name in SPECIAL_TOKENS])
    return tokenizer


def texts() -> Iterator[str]:
    """Yields the training texts: what is between the special tokens in prompts and answers of all tasks."""
    for second in range(_MAX_SECOND):
        yield f"stream\n{chat_template.time_label(second)} "
        yield f",{chat_template.time_label(second)}"
    for _ in range(_SYSTEM_PROMPTS):
        yield f"system\n{chat_template.DEFAULT_SYSTEM_PROMPT}"
    for word in _EVERYDAY.split():
        yield f"{word} {word} {word}"
    for task in TASKS:
        for sample in examples(task, "train", 0, _SAMPLES):
            pieces = [text for turn in sample.turns for text in turn] or [text for _, text, _ in sample.utterances]
            for rank, text in enumerate(pieces):
                yield f"assistant\n{text}" if rank % 2 else f"user\n{text}"
                yield "\n" + text if rank == 0 and sample.media else "\n"
