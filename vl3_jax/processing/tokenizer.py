"""Tokenizer of a checkpoint: converts text to token ids and back.

It is loaded from the checkpoint's `tokenizer.json`, and the ids of special tokens are read from that file.
"""

import functools
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence

import tokenizers
from tokenizers.decoders import DecodeStream

from vl3_jax.errors import InputError

_PIECE = 2**14  # characters that are encoded at a time to measure a text
_MOST_CHARACTERS = 64  # of a token on average; only runs of white space have more
IM_START, IM_END, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
IMAGE, IMAGE_PAD, VIDEO_PAD = "<image>", "<|image_pad|>", "<|video_pad|>"
STREAM_START, STREAM_END = "<|stream_start|>", "<|stream_end|>"
# Of a model whose answers have masks: a mask, the phrase that it is of, and a region that a question is about.
MASK, PHRASE_START, PHRASE_END, REGION_START, REGION_END = "[SEG]", "<p>", "</p>", "<vp>", "</vp>"
GROUNDING_TOKENS = (MASK, PHRASE_START, PHRASE_END, REGION_START, REGION_END)


class Tokenizer:
    """A byte-level BPE tokenizer with VideoLLaMA3's special tokens."""

    def __init__(self, backend: tokenizers.Tokenizer, name: str = "tokenizer"):
        self._backend, self._name = backend, name
        # Special tokens that a user types are encoded as ordinary text; real ones are inserted by id.
        self._backend.encode_special_tokens = True

    @classmethod
    def from_folder(cls, folder: str | os.PathLike) -> "Tokenizer":
        """Loads a tokenizer.

        Args:
          folder: A checkpoint folder with a `tokenizer.json`, or that file itself.

        Raises:
          InputError: The file is missing or unreadable.
        """
        path = os.fspath(folder)
        if os.path.isdir(path):
            path = os.path.join(path, "tokenizer.json")
        if not os.path.exists(path):
            raise InputError(f"{path}: no such file; the checkpoint needs the tokenizer.json it was released with")
        try:
            return cls(tokenizers.Tokenizer.from_file(path), path)
        except Exception as error:  # the library raises plain Exception
            raise InputError(f"{path}: not a tokenizer file ({' '.join(str(error).split())}); replace it") from error

    def __len__(self) -> int:
        return self._backend.get_vocab_size()

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Encodes text to token ids.

        Args:
          text: The text.
          special: Encode the names of special tokens in the text as these tokens, instead of as ordinary text.

        Raises:
          InputError: The text is not valid Unicode.
        """
        if special and self._special_names:
            pieces = re.split(f"({'|'.join(map(re.escape, self._special_names))})", text)
            # The split puts ordinary text at even positions and names of special tokens at odd ones.
            ids = ([self.id_of(piece)] if n % 2 else self.encode(piece) for n, piece in enumerate(pieces))
            return [token_id for piece_ids in ids for token_id in piece_ids]
        try:
            return self._backend.encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeEncodeError):  # of the library, for halves of characters
            raise InputError("the text holds one half of a character (a surrogate); write it in UTF-8") from None

    def may_fit(self, texts: Iterable[str], tokens: int) -> bool:
        """Returns whether texts may have at most so many tokens, at the cost of about so many.

        A long text is measured in pieces, whose tokens are a little more than those of the whole, so texts of up to
        twice as many tokens pass; `encode` counts these exactly.
        """
        texts = list(texts)
        length = sum(map(len, texts))
        if not tokens < length <= _MOST_CHARACTERS * tokens:
            return length <= tokens
        pieces = (text[start : start + _PIECE] for text in texts for start in range(0, len(text), _PIECE))
        counts = itertools.accumulate(len(self.encode(piece)) for piece in pieces)
        return all(count <= 2 * tokens for count in counts)

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        """Decodes token ids to text; bytes that are not valid UTF-8 become U+FFFD."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def id_of(self, token: str) -> int:
        """Returns the id of the token with this exact name.

        Raises:
          InputError: The tokenizer has no such token.
        """
        token_id = self._backend.token_to_id(token)
        if token_id is None:
            raise InputError(f"{self._name}: has no token {token}; use the tokenizer of a VideoLLaMA3 checkpoint")
        return token_id

    def to_json(self) -> str:
        """Returns the content of its `tokenizer.json`."""
        return self._backend.to_str()

    def placeholder(self, kind: str, native: bool = False) -> int:
        """Returns the placeholder id of vision tokens, whose embeddings the model replaces.

        Args:
          kind: "image" or "video".
          native: Prefer the tokens of the transformers port over the official `<image>`.

        Raises:
          InputError: The tokenizer has no placeholder token.
        """
        names = [IMAGE, IMAGE_PAD if kind == "image" else VIDEO_PAD]
        present = [name for name in names if self._backend.token_to_id(name) is not None] or [IMAGE]
        return self.id_of(present[-1 if native else 0])

    @property
    def stop_ids(self) -> list[int]:
        """Ids that end generation: end of turn and end of text."""
        ids = (self._backend.token_to_id(name) for name in (IM_END, END_OF_TEXT))
        return [token_id for token_id in ids if token_id is not None]

    def stream(self, chunks: Iterable[Sequence[int]]) -> Iterator[str]:
        """Decodes token ids as they are generated.

        Args:
          chunks: The ids, a few at a time.

        Yields:
          The text that each chunk adds, which may be empty: tokens wait until the text ends with a whole character
          and not with U+FFFD. After the last chunk, the rest. All of them together are the text of `decode`.
        """
        decoder, ids, shown = DecodeStream(skip_special_tokens=True), [], 0
        for chunk in chunks:
            ids += chunk
            text = "".join(decoder.step(self._backend, token_id) or "" for token_id in chunk)
            shown += len(text)
            yield text
        yield self.decode(ids)[shown:]

    @functools.cached_property
    def _special_names(self) -> list[str]:
        names = (token.content for token in self._backend.get_added_tokens_decoder().values() if token.special)
        return sorted(names, key=len, reverse=True)
