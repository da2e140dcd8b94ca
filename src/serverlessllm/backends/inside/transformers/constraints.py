"""Answers held to a JSON schema: which tokens may come next (llguidance's automaton)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import llguidance
import numpy as np
import torch

from serverlessllm.backends.inside.transformers.text import Text
from serverlessllm.core.errors import InvalidRequest

_WHITESPACE = " ?"
"""Between the parts of JSON: small models may go on and on with it."""


class Constraint:
    """What one answer may still say."""

    def __init__(self, matcher: llguidance.LLMatcher) -> None:
        self._matcher = matcher

    def masked(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits, shape `(vocabulary,)`, without the tokens that may not come next."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        may = torch.from_numpy(np.unpackbits(bits, bitorder="little").astype(bool))
        allowed = torch.zeros(logits.shape, dtype=torch.bool)
        count = min(len(may), len(logits))
        allowed[:count] = may[:count]
        return logits.masked_fill(~allowed, -torch.inf)

    def take(self, token: int) -> None:
        """This one came."""
        self._matcher.consume_token(token)


class Grammars:
    """Makes constraints over one tokenizer. Not for the event loop: a schema takes milliseconds,
    the first one of a large vocabulary a second."""

    def __init__(self, text: Text, eos: Sequence[int]) -> None:
        self._text = text
        self._eos = list(eos)
        self._made: llguidance.LLTokenizer | None = None

    def constraint(
        self, schema: Mapping[str, object], *, param: str, answers: int
    ) -> list[Constraint]:
        """For so many answers that are JSON of this schema.

        Raises:
            InvalidRequest: it is no schema, or says what cannot be held to.
        """
        if self._made is None:
            self._made = llguidance.LLTokenizer(self._text.to_json(), eos_token=self._eos)
        grammar = llguidance.LLMatcher.grammar_from_json_schema(
            json.dumps(schema), overrides={"whitespace_pattern": _WHITESPACE}
        )
        problem = llguidance.LLMatcher.validate_grammar(grammar, self._made)
        if problem:
            raise InvalidRequest(f"{param}: the JSON schema: {problem[:500]}", param=param)
        first = llguidance.LLMatcher(self._made, grammar)
        return [Constraint(first.deep_copy() if number else first) for number in range(answers)]
