"""What texts of a request must look like, as JSON Schema and Python both read it.

Python's `$` also matches before a last line feed, so each pattern refuses that one.
"""

from __future__ import annotations

DATA_URL = "^data:"
NAME = "^[a-zA-Z0-9_-]{1,64}$(?!\\n)"

_PART = "[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_-])?"
MODEL = rf"^(?!.*\.\.){_PART}(?:/{_PART})?(?:@{_PART})?$(?!\n)"
"""As `parse_model_id` checks it."""
_NUMBER = r"[0-9]+(?:\.[0-9]+)?"
DURATION = rf"^(?=.)(?:-1|forever|(?:{_NUMBER}(?:ms|s|m|h|d))*(?:{_NUMBER})?)$(?!\n)"
"""As `parse_duration_s` checks it."""
ID_AS_KEY = "^(?:0|[1-9][0-9]{0,8}|1[0-9]{9})$(?!\\n)"
"""A token's id as a key: what no vocabulary reaches is left out."""

PATTERN_WORDS = {
    DATA_URL: "send media inline, as a data: URL",
    NAME: "1 to 64 letters, digits, '_' and '-'",
}
"""How a text is told that does not match."""
