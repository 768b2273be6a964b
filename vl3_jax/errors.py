"""The exceptions whose message is one line: for what a person can put right, and for runs that cannot go on."""

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


class RunError(RuntimeError):
    """A run that cannot go on: a worker process was killed, the loss is no number. The message is one line.

    The `vl3` command prints it to stderr and exits with 1.
    """


class TooLongError(InputError):
    """A prompt that exceeds, together with its answer, the context of the model."""


class SettingError(InputError):
    """A value that a setting cannot have.

    Args:
      name: The setting, as the person who gave the value knows it.
      value: The value.
      advice: What to give instead.
    """

    def __init__(self, name: str, value: Any, advice: str):
        super().__init__(f"{name} is {printable(repr_of(value))}; {advice}")
        self.name, self.value, self.advice = name, value, advice

    def __reduce__(self):
        return SettingError, (self.name, self.value, self.advice)

    def renamed(self, name: str) -> "SettingError":
        """Returns the same error under another name of the setting, such as its flag."""
        return SettingError(name, self.value, self.advice)


def exit_code(error: BaseException) -> int:
    """Returns the exit code of a command that an error ends: 2 for bad input, otherwise 1."""
    return 2 if isinstance(error, InputError) else 1


def repr_of(value: Any) -> str:
    """Returns the `repr` of any value; Python refuses huge integers and lists in lists without end."""
    try:
        return repr(value)
    except (ValueError, RecursionError):
        return f"a huge {type(value).__name__}"


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
