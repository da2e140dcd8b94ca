"""The batching loop in this process: what becomes of its requests when it fails or they leave."""

from __future__ import annotations

import asyncio

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MambaConfig, PreTrainedModel

from serverlessllm.backends.inside.transformers.generation import BatchLimits, Generator, Update
from serverlessllm.backends.inside.transformers.sampling import Sampling
from serverlessllm.core.errors import LoadFailed, Unavailable
from serverlessllm.testing.waiting import eventually

LIMITS = BatchLimits(context=256, page=16, batch=64, slots=1)
GREEDY = Sampling(temperature=0)


@pytest.fixture
def model() -> PreTrainedModel:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model = AutoModelForCausalLM.from_config(config)
    assert isinstance(model, PreTrainedModel)
    model.eval()
    return model


async def test_a_loop_that_fails_tells_all_who_wait_and_takes_nobody_in(
    model: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    failed = asyncio.Event()
    generator = Generator(model, LIMITS, failed.set)

    def broken(*_args: object, **_kwargs: object) -> None:
        raise RuntimeError("no such kernel")

    model.forward = broken
    generator.start()
    updates: asyncio.Queue[Update] = asyncio.Queue()
    for prompt in ([1, 2, 3], [4, 5]):  # one in the batch, one that waits
        generator.submit(prompt, GREEDY, 5, frozenset(), updates.put_nowait)
    for _ in range(2):
        update = await updates.get()
        assert update.finished
        assert update.error is not None
        assert "no such kernel" not in update.error.message, "that is for the log"
    await failed.wait()
    assert "no such kernel" in caplog.text
    with pytest.raises(Unavailable):
        generator.submit([1], GREEDY, 1, frozenset(), updates.put_nowait)


async def test_a_cancelled_answer_leaves_its_place_to_who_waits(model: PreTrainedModel) -> None:
    generator = Generator(model, LIMITS, lambda: None)
    generator.start()
    try:
        never: list[Update] = []
        long = generator.submit([1, 2], GREEDY, 200, frozenset(), never.append)
        updates: asyncio.Queue[Update] = asyncio.Queue()
        generator.submit([3, 4], GREEDY, 2, frozenset(), updates.put_nowait)
        generator.cancel(long)
        tokens: list[int] = []
        while True:
            update = await updates.get()
            tokens += update.tokens
            if update.finished:
                break
        assert len(tokens) == 2
        assert not any(update.finished for update in never)
        await eventually(lambda: generator.running == generator.queued == 0)
        generator.cancel(long)  # again: nothing happens
    finally:
        generator.close()


async def test_a_model_that_keeps_a_state_is_refused_at_its_start() -> None:
    config = MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=4)
    model = AutoModelForCausalLM.from_config(config)
    assert isinstance(model, PreTrainedModel)
    with pytest.raises(LoadFailed, match="cannot batch MambaForCausalLM"):
        Generator(model, LIMITS, lambda: None)
