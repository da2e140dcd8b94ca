"""Limits on the fields of a request."""

from __future__ import annotations

import msgspec


class RequestLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What a request may ask for; more is 400 with the field's name."""

    depth_max: int = 64
    """Nesting of arrays and objects in the body."""
    strings_max: int = 100_000
    """Strings in the body, keys included."""
    backslashes_max: int = 400_000
    """Backslashes in the body; a text of program code has one in 20 characters."""
    commas_max: int = 1_000_000
    """Commas in the body: one in four characters of the largest body."""
    members_max: int = 40_000
    """Members of all objects in the body; a message has two or three. Each is an object of the
    interpreter's wherever a field is passed on as it came, and the interpreter does nothing else
    meanwhile."""
    containers_max: int = 100_000
    """Arrays and objects in the body."""
    n_max: int = 128
    """Answers to one prompt (`n`, `best_of`)."""
    max_tokens_max: int = 1_048_576
    """Tokens of one answer (`max_tokens`, `max_completion_tokens`)."""
    stop_max: int = 4
    """Stop sequences."""
    stop_chars_max: int = 4096
    """Of one stop sequence."""
    messages_max: int = 16_384
    """Messages of one chat."""
    inputs_max: int = 2048
    """Prompts or embedding inputs of one request."""
    top_logprobs_max: int = 20
    """Alternatives per token."""
    tools_max: int = 128
    """Tools of one chat."""
    schema_bytes_max: int = 262_144
    """Of one JSON Schema: of an answer (`response_format`) or of a tool's parameters."""
    logit_bias_max: int = 4096
    """Tokens in `logit_bias`."""
    token_ids_max: int = 300_000
    """Token ids of one request, all of its prompts together."""
    dimensions_max: int = 65_536
    """Length of an embedding (`dimensions`)."""
