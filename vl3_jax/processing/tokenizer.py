"""Tokenizer of a checkpoint: converts text to token ids and back.

It is loaded from the checkpoint's `tokenizer.json`, and the ids of special tokens are read from that file.
"""

import codecs
import functools
import json
import os
import re

import tokenizers

from vl3_jax.errors import InputError

IM_START, IM_END, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
IMAGE, IMAGE_PAD, VIDEO_PAD = "<image>", "<|image_pad|>", "<|video_pad|>"
STREAM_START, STREAM_END = "<|stream_start|>", "<|stream_end|>"


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
        """
        if special and self._special_names:
            pieces = re.split(f"({'|'.join(map(re.escape, self._special_names))})", text)
            # The split puts ordinary text at even positions and names of special tokens at odd ones.
            ids = ([self.id_of(piece)] if n % 2 else self.encode(piece) for n, piece in enumerate(pieces))
            return [token_id for piece_ids in ids for token_id in piece_ids]
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        """Decodes token ids to text; bytes that are not valid UTF-8 become U+FFFD."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def find(self, token: str) -> int | None:
        """Returns the id of the token with this exact name, or None."""
        return self._backend.token_to_id(token)

    def id_of(self, token: str) -> int:
        """Returns the id of the token with this exact name.

        Raises:
          InputError: The tokenizer has no such token.
        """
        token_id = self.find(token)
        if token_id is None:
            raise InputError(f"{self._name}: has no token {token}; use the tokenizer of a VideoLLaMA3 checkpoint")
        return token_id

    def placeholder(self, kind: str, native: bool = False) -> int:
        """Returns the placeholder id of vision tokens, whose embeddings the model replaces.

        Args:
          kind: "image" or "video".
          native: Prefer the tokens of the transformers port over the official `<image>`.

        Raises:
          InputError: The tokenizer has no placeholder token.
        """
        names = [IMAGE, IMAGE_PAD if kind == "image" else VIDEO_PAD]
        for name in reversed(names) if native else names:
            if (token_id := self.find(name)) is not None:
                return token_id
        return self.id_of(IMAGE)

    @property
    def stop_ids(self) -> list[int]:
        """Ids that end generation: end of turn and end of text."""
        return [token_id for name in (IM_END, END_OF_TEXT) if (token_id := self.find(name)) is not None]

    @property
    def pad_id(self) -> int:
        """Id that fills unused positions."""
        token_id = self.find(END_OF_TEXT)
        return 0 if token_id is None else token_id

    def stream(self, skip_special_tokens: bool = True) -> "TextStream":
        """Returns an incremental decoder for one generated text."""
        return TextStream(self, skip_special_tokens)

    @functools.cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(i for i, token in self._backend.get_added_tokens_decoder().items() if token.special)

    @functools.cached_property
    def _special_names(self) -> list[str]:
        names = (token.content for token in self._backend.get_added_tokens_decoder().values() if token.special)
        return sorted(names, key=len, reverse=True)

    @functools.cached_property
    def _is_byte_level(self) -> bool:
        return (json.loads(self._backend.to_str()).get("decoder") or {}).get("type") == "ByteLevel"

    def token_bytes(self, token_id: int, skip_special_tokens: bool = True) -> bytes:
        """Returns the UTF-8 bytes that one token adds to the text; they may be part of a character."""
        token = self._backend.id_to_token(token_id)
        if token is None or (skip_special_tokens and token_id in self._special_ids):
            return b""
        if not self._is_byte_level:
            return self.decode([token_id], skip_special_tokens).encode()
        alphabet = _byte_of_character()
        if all(character in alphabet for character in token):
            return bytes(alphabet[character] for character in token)
        return token.encode()


class TextStream:
    """Decodes token ids to text incrementally, holding back the first bytes of a character until it is complete."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True):
        self._tokenizer, self._skip_special_tokens = tokenizer, skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Returns the text that is complete after this token; may be empty."""
        return self._utf8.decode(self._tokenizer.token_bytes(int(token_id), self._skip_special_tokens))

    def flush(self) -> str:
        """Returns the rest of the text at its end: nothing, or U+FFFD for an incomplete character."""
        return self._utf8.decode(b"", final=True)


@functools.cache
def _byte_of_character() -> dict[str, int]:
    """Returns the byte of each character of the byte-level BPE alphabet.

    Byte-level BPE writes each byte as a printable character: itself where printable, else from U+0100 on, in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + rank): byte for rank, byte in enumerate(others)}
