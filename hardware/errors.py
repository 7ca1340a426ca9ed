"""The one error that bad input raises, in every room.

Every message is one sentence that names the rule and the value, and `path` says where
the value stood, so that a command line, a REST reply and a form can show the same thing.
"""

from __future__ import annotations


class InputError(ValueError):
    """Input that cannot be used, with the place it came from.

    `path` is the dotted path of the field (`cluster.pools[0].device`, `line 12`) or
    empty when the whole input is meant; `hint` is an optional second sentence.
    """

    def __init__(self, path: str, message: str, hint: str = "") -> None:
        self.path = path
        self.message = message
        self.hint = hint
        super().__init__(str(self))

    def __reduce__(self) -> tuple[type[InputError], tuple[str, str, str]]:
        # Exceptions are pickled by their text alone; workers send this one home.
        return InputError, (self.path, self.message, self.hint)

    def __str__(self) -> str:
        text = f"{self.path}: {self.message}" if self.path else self.message
        return f"{text} ({self.hint})" if self.hint else text
