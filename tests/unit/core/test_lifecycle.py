import pytest
from hypothesis import given
from hypothesis import strategies as st

from serverlessllm.core.lifecycle import TRANSITIONS, InstanceState, advance, is_final

states = st.sampled_from(list(InstanceState))


def test_every_state_has_its_row():
    assert set(TRANSITIONS) == set(InstanceState)


@given(now=states, to=states)
def test_only_the_table_moves_an_instance(now, to):
    if to in TRANSITIONS[now]:
        assert advance(now, to) is to
    else:
        with pytest.raises(AssertionError, match="no transition"):
            advance(now, to)


@pytest.mark.parametrize("state", list(InstanceState))
def test_every_state_reaches_an_end(state):
    seen, todo = set(), [state]
    while todo:
        now = todo.pop()
        if now not in seen:
            seen.add(now)
            todo.extend(TRANSITIONS[now])
    assert any(is_final(s) for s in seen)


def test_only_ready_serves_and_only_starting_becomes_ready():
    assert [s for s, to in TRANSITIONS.items() if InstanceState.READY in to] == [
        InstanceState.STARTING
    ]
