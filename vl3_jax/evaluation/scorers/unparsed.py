"""The error of a response out of which no answer can be read."""


class UnparsedError(ValueError):
    """No answer can be read; the sample scores 0 and is counted as unparsed.

    Args:
      reason: What is missing; in the official form the exception that the official code raises there.
    """

    def __init__(self, reason: str = "no answer found"):
        super().__init__(reason)
        self.reason = reason
