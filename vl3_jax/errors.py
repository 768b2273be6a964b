"""The one exception for what a person can put right: a bad file, a bad flag, a missing shard."""


class InputError(Exception):
    """Bad input. The message is one line: what is wrong, the value, where (file and line), what to do.

    The `vl3` command prints it to stderr and exits with 2; any other exception is a failure of ours, 1.
    """

    def __init__(self, message: str):
        super().__init__(printable(message))


def printable(text: str) -> str:
    """Returns the text on one line, with line breaks, control characters and lone surrogates as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
