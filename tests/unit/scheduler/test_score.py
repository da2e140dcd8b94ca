"""The score is the formula, and it moves the right way in each of its terms."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from serverlessllm.scheduler.score import Weights, score

seconds = st.floats(0, 1e4)
weights = st.builds(
    Weights, alpha_s=seconds, beta_s=seconds, gamma_s=seconds, delta=st.floats(0, 10)
)
inputs = st.fixed_dictionaries(
    {
        "cache_level": st.integers(0, 3),
        "kv_hit_rate": st.floats(0, 1),
        "queue_len": st.integers(0, 10_000),
        "size_bytes": st.integers(0, 2**41),
        "bandwidth_bytes_s": st.floats(1e3, 1e12),
    }
)


@given(weights, inputs)
def test_it_is_the_formula(w: Weights, x: dict[str, Any]) -> None:
    expected = (
        w.alpha_s * x["cache_level"]
        - w.beta_s * x["kv_hit_rate"]
        + w.gamma_s * x["queue_len"]
        + w.delta * (x["size_bytes"] / x["bandwidth_bytes_s"])
    )
    assert score(w, **x).score_s == expected


@given(weights, inputs, inputs)
def test_each_term_pulls_its_own_way(w: Weights, x: dict[str, Any], y: dict[str, Any]) -> None:
    for name, cheaper in {
        "cache_level": min,
        "kv_hit_rate": max,
        "queue_len": min,
        "size_bytes": min,
        "bandwidth_bytes_s": max,
    }.items():
        better, worse = {**x}, {**x}
        better[name] = cheaper(x[name], y[name])
        worse[name] = x[name] if better[name] == y[name] else y[name]
        assert score(w, **better).score_s <= score(w, **worse).score_s


def test_a_worked_example() -> None:
    """SmolLM2 on NVMe (α 1 s, γ 2 s): 2 s of level, 94 MiB at 470 MiB/s, one request ahead."""
    terms = score(
        Weights(alpha_s=1.0, beta_s=0.5, gamma_s=2.0),
        cache_level=2,
        kv_hit_rate=0.5,
        queue_len=1,
        size_bytes=94 << 20,
        bandwidth_bytes_s=470 << 20,
    )
    assert (terms.cache_s, terms.kv_s, terms.queue_s, terms.move_s) == (2.0, -0.25, 2.0, 0.2)
    assert terms.score_s == 3.95
