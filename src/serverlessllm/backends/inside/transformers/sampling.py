"""The next token of each request: its own temperature, seed, penalties, and log probabilities."""

from __future__ import annotations

import os
from collections.abc import Sequence

import msgspec
import torch

from serverlessllm.backends.inside.transformers.constraints import Constraint

_GREEDY_BELOW = 1e-5


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """How one answer's tokens are chosen."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0: all tokens."""
    min_p: float = 0.0
    """Tokens that are less likely than this share of the likeliest one are left out."""
    seed: int | None = None
    """Equal seeds give equal answers to equal prompts."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    alternatives: int | None = None
    """Most likely tokens to tell with each token; None: no log probabilities at all."""

    @property
    def greedy(self) -> bool:
        return self.temperature < _GREEDY_BELOW or self.top_k == 1

    @property
    def plain(self) -> bool:
        """Whether the most likely token is all that is wanted."""
        return self.greedy and not self.weighed and self.alternatives is None

    @property
    def weighed(self) -> bool:
        """Whether logits are changed before one is chosen."""
        return bool(
            self.presence_penalty
            or self.frequency_penalty
            or self.logit_bias
            or self.repetition_penalty != 1
        )


class Score(msgspec.Struct, frozen=True, kw_only=True):
    """Log probability of the chosen token, as the model had it, and of the most likely ones."""

    logprob: float
    alternatives: tuple[tuple[int, float], ...]


class Sampler:
    """Chooses one request's tokens, one after the other."""

    def __init__(
        self, sampling: Sampling, prompt: Sequence[int], constraint: Constraint | None = None
    ) -> None:
        self.sampling = sampling
        self.plain = sampling.plain and constraint is None
        """Whether the most likely token is all that is wanted."""
        self._constraint = constraint
        self.scores: list[Score] = []
        """One a token, where they were asked for."""
        seed = sampling.seed
        if seed is None:  # of this process alone: forks of one template share torch's own state
            seed = int.from_bytes(os.urandom(8), "little")
        self._chance = torch.Generator().manual_seed(seed % (1 << 64))
        self._counts: dict[int, int] = {}
        self._seen = set(prompt) if sampling.repetition_penalty != 1 else set()

    def choose(self, logits: torch.Tensor) -> int:
        """The next token by its float32 logits, shape `(vocabulary,)`, which stay as they are."""
        weighed = self._weigh(logits) if self.sampling.weighed else logits
        if self._constraint is not None:
            weighed = self._constraint.masked(weighed)
        token = int(weighed.argmax()) if self.sampling.greedy else self._draw(weighed)
        if self.sampling.alternatives is not None:
            self.scores.append(score(logits, token, self.sampling.alternatives))
        if self.sampling.weighed:
            self._counts[token] = self._counts.get(token, 0) + 1
            self._seen.add(token)
        if self._constraint is not None:
            self._constraint.take(token)
        return token

    def _weigh(self, logits: torch.Tensor) -> torch.Tensor:
        sampling = self.sampling
        logits = logits.clone()
        if sampling.repetition_penalty != 1 and self._seen:
            seen = torch.tensor(sorted(self._seen))
            of_seen = logits[seen]
            raised = of_seen < 0
            factor = sampling.repetition_penalty
            logits[seen] = torch.where(raised, of_seen * factor, of_seen / factor)
        if self._counts and (sampling.presence_penalty or sampling.frequency_penalty):
            tokens = torch.tensor(list(self._counts))
            counts = torch.tensor(list(self._counts.values()), dtype=logits.dtype)
            logits[tokens] -= sampling.presence_penalty + sampling.frequency_penalty * counts
        for token, bias in sampling.logit_bias.items():
            if 0 <= token < logits.numel():
                logits[token] += bias
        return logits

    def _draw(self, logits: torch.Tensor) -> int:
        sampling = self.sampling
        logits = logits / sampling.temperature
        ids: torch.Tensor | None = None
        if 0 < sampling.top_k < logits.numel():
            logits, ids = logits.topk(sampling.top_k)
        elif sampling.top_p < 1:
            logits, ids = logits.sort(descending=True)
        shares = logits.softmax(-1)
        if sampling.top_p < 1:  # sorted by now: drop what comes after the share is full
            shares = shares.masked_fill(shares.cumsum(-1) - shares >= max(sampling.top_p, 1e-9), 0)
        if sampling.min_p:
            shares = shares.masked_fill(shares < sampling.min_p * shares.max(), 0)
        place = torch.multinomial(shares, 1, generator=self._chance)
        return int(place if ids is None else ids[place])


def choose(logits: torch.Tensor, samplers: Sequence[Sampler]) -> torch.Tensor:
    """A token for each row of `logits`, shape `(≥ samplers, vocabulary)`."""
    rows = logits[: len(samplers)]
    if all(sampler.plain for sampler in samplers):
        return rows.argmax(-1)
    host = rows.cpu()
    return torch.tensor([sampler.choose(row) for sampler, row in zip(samplers, host, strict=True)])


def score(logits: torch.Tensor, token: int, alternatives: int) -> Score:
    """How likely a token was by its float32 logits, shape `(vocabulary,)`."""
    logprobs = logits.log_softmax(-1)
    values, ids = logprobs.topk(min(alternatives, logits.numel()))
    return Score(
        logprob=float(logprobs[token]),
        alternatives=tuple(zip(ids.tolist(), values.tolist(), strict=True)),
    )
