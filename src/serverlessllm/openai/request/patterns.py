"""What texts of a request must look like, as JSON Schema and Python both read it.

Python's `$` also matches before a last line feed, so each pattern refuses that one.
"""

from __future__ import annotations

DATA_URL = "^data:"
NAME = "^[a-zA-Z0-9_-]{1,64}$(?!\\n)"

PATTERN_WORDS = {
    DATA_URL: "send media inline, as a data: URL",
    NAME: "1 to 64 letters, digits, '_' and '-'",
}
"""How a text is told that does not match."""
