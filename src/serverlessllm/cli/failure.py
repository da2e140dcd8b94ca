"""What a verb raises when it cannot do what it was asked."""

from __future__ import annotations


class Failure(Exception):
    """An expected failure: what is wrong, and what to do about it.

    `code` is the server's error code when it was the server that refused.
    """

    def __init__(
        self, message: str, cure: str = "", *, exit_status: int = 1, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.cure = cure
        self.exit_status = exit_status
        self.code = code
