"""The one exception for what a person can put right: a bad file, a bad flag, a missing shard."""

from typing import Any

NAME_LENGTH = 200  # characters of a name or value in a message
_MESSAGE_LENGTH = 4000


class InputError(Exception):
    """Bad input. The message is one line: what is wrong, the value, where (file and line), what to do.

    Control characters, which a file name may hold, are escaped, and a message of endless length is cut.

    The `vl3` command prints it to stderr and exits with 2; any other exception is a failure of ours, 1.
    """

    def __init__(self, message: Any = ""):
        super().__init__(printable(message, _MESSAGE_LENGTH))


def printable(value: Any, length: int = NAME_LENGTH) -> str:
    """Returns a name or value as a message shows it: cut in the middle, and without characters that steer a terminal.

    Args:
      value: A path, URL, text or any other value.
      length: Most characters before they are escaped.
    """
    text = str(value)
    if len(text) > length:
        tail = length // 4
        text = f"{text[: length - tail - 3]}...{text[-tail:]}"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
