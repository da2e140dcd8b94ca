"""The score: `α·cache_level − β·kv_hit_rate + γ·queue_len + δ·(size/bw)`; the lowest wins."""

from __future__ import annotations

import msgspec


class Weights(msgspec.Struct, frozen=True, kw_only=True):
    """α, β, γ in seconds, δ a plain factor: so a score is in seconds too."""

    alpha_s: float
    beta_s: float
    gamma_s: float
    delta: float = 1.0


class Terms(msgspec.Struct, frozen=True, kw_only=True):
    """The four terms of one agent's score, in seconds, each with its sign."""

    cache_s: float
    """α·cache_level"""
    kv_s: float
    """−β·kv_hit_rate"""
    queue_s: float
    """γ·queue_len"""
    move_s: float
    """δ·(size/bw)"""

    @property
    def score_s(self) -> float:
        """The sum: the lowest wins."""
        return self.cache_s + self.kv_s + self.queue_s + self.move_s


def score(
    weights: Weights,
    *,
    cache_level: int,
    kv_hit_rate: float,
    queue_len: int,
    size_bytes: int,
    bandwidth_bytes_s: float,
) -> Terms:
    """Score one agent.

    `queue_len` is the number of requests a new one would wait behind; `size_bytes` still have to
    move to the agent's device, over a way whose slowest hop has `bandwidth_bytes_s` (> 0).
    """
    return Terms(
        cache_s=weights.alpha_s * cache_level,
        kv_s=-weights.beta_s * kv_hit_rate,
        queue_s=weights.gamma_s * queue_len,
        move_s=weights.delta * (size_bytes / bandwidth_bytes_s),
    )
