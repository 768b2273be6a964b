"""The one exception for what a person can put right: a bad file, a bad flag, a missing shard."""


class InputError(Exception):
    """Bad input. The message is one line: what is wrong, the value, where (file and line), what to do.

    The `vl3` command prints it to stderr and exits with 2; any other exception is a failure of ours, 1.
    """
