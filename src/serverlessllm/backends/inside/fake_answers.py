"""The fake engine's answers, in the API's shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from serverlessllm.backends.inside.fake_asks import Plan
from serverlessllm.backends.inside.fake_words import alternatives_of, logprob_of

Kind = Literal["chat", "text"]


class Answer:
    """One choice that is being made."""

    def __init__(
        self,
        index: int,
        kind: Kind,
        plan: Plan,
        *,
        alternatives: int | None,
        call: str | None = None,
        echo: Sequence[str] = (),
    ) -> None:
        """`alternatives`: told with each token; None: no log probabilities at all. `call`: the
        name of the function that it calls."""
        self.plan = plan
        self.echo = list(echo)
        self.tokens: list[str] = []
        """So far."""
        self._index = index
        self._kind = kind
        self._alternatives = alternatives
        self._scored = alternatives is not None
        self._call = call

    @property
    def finish_reason(self) -> str:
        ended = self.plan.finish_reason == "stop"
        return "tool_calls" if ended and self._call is not None else self.plan.finish_reason

    def opening(self) -> dict[str, object]:
        """The choice of the first chunk; a completion has one only when it repeats its prompt."""
        choice: dict[str, object] = {"index": self._index, "finish_reason": None}
        if self._kind == "text":
            scores = self._scores(self.echo) if self._scored else None
            return choice | {"text": "".join(self.echo), "logprobs": scores}
        delta: dict[str, object] = {"role": "assistant", "content": "", "refusal": None}
        if self._call is not None:
            delta["tool_calls"] = [{"index": 0} | self._called("")]
        return choice | {"delta": delta}

    def chunk(self, number: int) -> dict[str, object]:
        """The choice of the chunk with this token."""
        token = self.tokens[number]
        choice: dict[str, object] = {"index": self._index, "finish_reason": None}
        if self._kind == "text":
            choice["text"] = token
        elif self._call is not None:
            choice["delta"] = {"tool_calls": [{"index": 0, "function": {"arguments": token}}]}
        else:
            choice["delta"] = {"content": token}
        if self._scored:
            choice["logprobs"] = self._scores([token])
        return choice

    def closing(self) -> dict[str, object]:
        """The choice of the last chunk."""
        last: dict[str, object] = {"delta": {}} if self._kind == "chat" else {"text": ""}
        return {"index": self._index, "finish_reason": self.finish_reason} | last

    def whole(self) -> dict[str, object]:
        """The choice of an answer that is not streamed."""
        said = self.echo + self.tokens
        text = "".join(said)
        choice: dict[str, object] = {"index": self._index, "finish_reason": self.finish_reason}
        if self._kind == "text":
            choice["text"] = text
        else:
            message: dict[str, object] = {"role": "assistant", "content": text, "refusal": None}
            if self._call is not None:
                message |= {"content": None, "tool_calls": [self._called(text)]}
            choice["message"] = message
        choice["logprobs"] = self._scores(said) if self._scored else None
        return choice

    def _called(self, arguments: str) -> dict[str, object]:
        function = {"name": self._call, "arguments": arguments}
        return {"id": f"call_fake_{self._index}", "type": "function", "function": function}

    def _scores(self, tokens: Sequence[str]) -> dict[str, object]:
        """Log probabilities in the API's two shapes, the same for the same token."""
        count = self._alternatives or 0
        if self._kind == "chat":
            content = []
            for token in tokens:
                others = [_scored(*other) for other in alternatives_of(token, count)]
                content.append(_scored(token, logprob_of(token)) | {"top_logprobs": others})
            return {"content": content, "refusal": None}
        return {
            "tokens": tokens,
            "token_logprobs": [logprob_of(token) for token in tokens],
            "top_logprobs": [dict(alternatives_of(token, count)) for token in tokens],
        }


def _scored(token: str, logprob: float) -> dict[str, object]:
    return {"token": token, "logprob": logprob, "bytes": list(token.encode())}
