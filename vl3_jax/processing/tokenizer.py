"""Text to token ids and back, from a checkpoint's `tokenizer.json`; every special id is read from the file."""

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
        # Special tokens that a user types are ordinary text; real ones are placed by id.
        self._backend.encode_special_tokens = True

    @classmethod
    def from_folder(cls, folder: str | os.PathLike) -> "Tokenizer":
        """Reads `tokenizer.json` of a checkpoint folder (or that file itself). InputError if missing or unreadable."""
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
        """Ids of text. The name of a special token in it stays ordinary text, or with `special` gives the token."""
        if special and self._special_names:
            pieces = re.split(f"({'|'.join(map(re.escape, self._special_names))})", text)
            return [
                i for rank, piece in enumerate(pieces) for i in ([self.find(piece)] if rank % 2 else self.encode(piece))
            ]
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        """Text of ids; bytes that are no UTF-8 become U+FFFD."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def find(self, token: str) -> int | None:
        """Id of a token by its exact name, None if there is none."""
        return self._backend.token_to_id(token)

    def id_of(self, token: str) -> int:
        """Id of a token that must exist. InputError if it does not."""
        found = self.find(token)
        if found is None:
            raise InputError(f"{self._name}: has no token {token}; use the tokenizer of a VideoLLaMA3 checkpoint")
        return found

    def placeholder(self, kind: str, native: bool = False) -> int:
        """Id that stands where vision tokens go; the model overwrites it.

        Args:
          kind: "image" or "video".
          native: prefer the transformers port's own tokens to the official `<image>`.
        """
        names = [IMAGE, IMAGE_PAD if kind == "image" else VIDEO_PAD]
        for name in reversed(names) if native else names:
            if (found := self.find(name)) is not None:
                return found
        return self.id_of(IMAGE)

    @property
    def stop_ids(self) -> list[int]:
        """Ids that end an answer: end of turn, end of text."""
        return [found for name in (IM_END, END_OF_TEXT) if (found := self.find(name)) is not None]

    @property
    def pad_id(self) -> int:
        """Id that fills unused positions."""
        found = self.find(END_OF_TEXT)
        return 0 if found is None else found

    def stream(self, skip_special_tokens: bool = True) -> "TextStream":
        """A decoder for one answer, fed token by token."""
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
        """What one token adds to the text, which may be part of a character."""
        token = self._backend.id_to_token(token_id)
        if token is None or (skip_special_tokens and token_id in self._special_ids):
            return b""
        if not self._is_byte_level:
            return self.decode([token_id], skip_special_tokens).encode()
        alphabet = _byte_of_letter()
        if all(letter in alphabet for letter in token):
            return bytes(alphabet[letter] for letter in token)
        return token.encode()


class TextStream:
    """Turns ids into text as they come, holding back the beginning of a character until it is whole."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True):
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Text that is certain after this token; may be empty."""
        return self._utf8.decode(self._tokenizer.token_bytes(int(token_id), self._skip))

    def flush(self) -> str:
        """What is held back at the end: nothing, or U+FFFD for a character that never became whole."""
        return self._utf8.decode(b"", final=True)


@functools.cache
def _byte_of_letter() -> dict[str, int]:
    """Byte-level BPE writes each byte as a printable letter: itself where printable, else from U+0100 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + rank): byte for rank, byte in enumerate(others)}
