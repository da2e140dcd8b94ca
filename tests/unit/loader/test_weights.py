"""Weights on devices: each byte where it belongs, each layer awaited by who computes with it."""

from __future__ import annotations

import threading

import pytest

from serverlessllm.checkpoint.index import Chunk, Index
from serverlessllm.core.errors import LoadFailed
from serverlessllm.loader.plan import Span
from serverlessllm.loader.weights import Weights
from serverlessllm.testing.accelerator import LateAccelerator, LateEvent

GRID = 64


def weights_of(*sizes: int) -> tuple[Weights, LateAccelerator]:
    """Spread over as many devices as sizes are given."""
    accelerator = LateAccelerator(dict.fromkeys(range(len(sizes)), 1000))
    spans: list[Span] = []
    for device, size in enumerate(sizes):
        start = spans[-1].end if spans else 0
        spans.append(Span(device=device, offset=start, size_bytes=size))
    total = sum(sizes)
    index = Index(
        model="m",
        source="file:///m",
        revision="r",
        kind="tensors",
        size_bytes=total,
        chunk_bytes=GRID,
        chunks=(Chunk(blake3="0" * 64, crc32c=0),) * -(-total // GRID),
        tensors=(),
    )
    parts = tuple((span, accelerator.allocate(span.device, span.size_bytes)) for span in spans)
    return Weights(index, parts), accelerator


def test_a_write_over_a_border_goes_to_both_devices() -> None:
    weights, accelerator = weights_of(100, 60)
    data = bytes(range(160))
    event = weights.write(memoryview(data)[:50], 0)
    event.wait()
    weights.write(memoryview(data)[50:], 50).wait()
    first, second = accelerator.allocated
    assert bytes(first.data) + bytes(second.data) == data
    weights.free()
    assert accelerator.allocated == []


def test_a_stream_waits_for_the_chunks_of_its_layer_and_for_no_others() -> None:
    weights, accelerator = weights_of(100, 60)
    data = bytes(range(160))
    accelerator.gate.clear()
    for number in (1, 0):
        weights.write(memoryview(data)[number * GRID : (number + 1) * GRID], number * GRID)
        weights.arrived(number)
    stream: list[LateEvent] = []
    weights.follow(10, 60, stream)  # from chunk 0 into chunk 1, which lies on both devices
    assert len(stream) == 3
    assert not any(event.is_over for event in stream)  # who asks does not wait for the device
    accelerator.gate.set()
    for event in stream:
        event.wait()
    assert bytes(accelerator.allocated[0].data) == data[:100]
    weights.free()


def test_who_follows_a_chunk_that_is_not_on_its_way_waits_for_it() -> None:
    weights, _ = weights_of(160)
    stream: list[LateEvent] = []
    followed = threading.Event()

    def follow() -> None:
        weights.follow(0, 160, stream)
        followed.set()

    thread = threading.Thread(target=follow)
    thread.start()
    for number in (2, 0, 1):
        assert not followed.is_set()
        weights.arrived(number)
    thread.join(60)
    assert len(stream) == 3
    weights.free()


def test_who_follows_a_load_that_fails_is_told() -> None:
    weights, _ = weights_of(160)
    weights.arrived(0)
    weights.end()
    weights.follow(0, GRID, [])
    with pytest.raises(LoadFailed, match="load the model again"):
        weights.follow(0, 160, [])
    weights.free()


def test_a_handle_names_every_part() -> None:
    weights, _ = weights_of(100, 60)
    first, second = weights.handle().parts
    assert (first.offset, first.size_bytes, first.memory) == (0, 100, b"device 0")
    assert (second.offset, second.size_bytes, second.memory) == (100, 60, b"device 1")
    weights.free()


def test_freeing_waits_for_copies_that_nobody_waits_for() -> None:
    weights, accelerator = weights_of(160)
    weights.write(memoryview(bytes(160)), 0)
    weights.free()  # the fake refuses while copies are under way
    assert accelerator.allocated == []
