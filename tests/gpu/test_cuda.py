"""Weights on real GPUs: whole, in order, shared with another process, given back."""

from __future__ import annotations

import asyncio
import sys
from asyncio.subprocess import PIPE
from pathlib import Path

import msgspec
import pytest
import torch
from blake3 import blake3
from tests.gpu.conftest import CHUNK_BYTES, LAYER_BYTES, LAYERS, SIZE_BYTES

from serverlessllm.core.cluster import CacheLevel
from serverlessllm.core.errors import OutOfSpace
from serverlessllm.loader.accelerator import Allocation
from serverlessllm.loader.device import Cuda, CudaMemory
from serverlessllm.loader.tiers.staging import Staging
from serverlessllm.loader.weights import Weights
from serverlessllm.testing.waiting import eventually

DEVICE, DRAM, NVME = CacheLevel.DEVICE, CacheLevel.DRAM, CacheLevel.NVME


def tensor_of(allocation: Allocation) -> torch.Tensor:
    assert isinstance(allocation, CudaMemory)
    tensor = allocation.memory
    assert isinstance(tensor, torch.Tensor)
    return tensor


def bytes_of(weights: Weights) -> bytes:
    return b"".join(bytes(tensor_of(memory).cpu().numpy()) for _, memory in weights.parts)


@pytest.mark.parametrize("level", [DRAM, NVME])
async def test_bytes_are_the_checkpoint_s(node, level):
    ref = await node.publish()
    async with node.loader() as loader:
        (await loader.load(ref, level)).release()
        await loader.settled()
        async with await loader.load(ref, DEVICE) as resident:
            assert resident.device is not None
            assert bytes_of(resident.device.weights) == node.data
            (hop,) = resident.hops
            assert (hop.hop, hop.bytes_moved) == (f"{level.tier}→device", SIZE_BYTES)
            assert hop.limit_bytes_s is not None
        taken = torch.cuda.memory_reserved()
        assert await loader.evict(ref.id, NVME) >= SIZE_BYTES
        assert torch.cuda.memory_reserved() <= taken - SIZE_BYTES


async def test_a_stream_computes_with_a_layer_as_soon_as_it_is_there(node):
    ref = await node.publish()
    async with node.loader(copy_threads=1) as loader:
        (await loader.load(ref, NVME)).release()
        load = asyncio.create_task(loader.load(ref, DEVICE))
        await eventually(lambda: loader.on_device(ref.id) is not None)
        weights = loader.on_device(ref.id)
        assert weights is not None
        ((_, allocation),) = weights.parts
        memory = tensor_of(allocation)
        stream = torch.cuda.Stream()
        sums = []
        for number in range(LAYERS):
            at = number * LAYER_BYTES
            await asyncio.to_thread(weights.follow, at, LAYER_BYTES, stream)
            with torch.cuda.stream(stream):
                sums.append(memory[at : at + LAYER_BYTES].sum(dtype=torch.int64))
        stream.synchronize()
        for number, total in enumerate(sums):
            assert int(total) == sum(node.data[number * LAYER_BYTES : (number + 1) * LAYER_BYTES])
        (await load).release()


async def test_another_process_sees_the_same_memory(node):
    ref = await node.publish()
    async with node.loader() as loader, await loader.load(ref, DEVICE) as resident:
        assert resident.device is not None
        child = await asyncio.create_subprocess_exec(
            sys.executable,
            str(Path(__file__).with_name("child.py")),
            stdin=PIPE,
            stdout=PIPE,
        )
        assert child.stdin is not None
        assert child.stdout is not None
        handle = resident.device.weights.handle()
        child.stdin.write(msgspec.json.encode(handle) + b"\n")
        assert (await child.stdout.readline()).decode().strip() == blake3(node.data).hexdigest()
        await child.communicate()
        assert child.returncode == 0
        assert bytes_of(resident.device.weights) == node.data  # it outlived the other's


async def test_a_killed_consumer_keeps_nothing(node):
    ref = await node.publish()
    async with node.loader() as loader:
        async with await loader.load(ref, DEVICE) as resident:
            assert resident.device is not None
            child = await asyncio.create_subprocess_exec(
                sys.executable,
                str(Path(__file__).with_name("child.py")),
                stdin=PIPE,
                stdout=PIPE,
            )
            assert child.stdin is not None
            assert child.stdout is not None
            handle = resident.device.weights.handle()
            child.stdin.write(msgspec.json.encode(handle) + b"\n")
            await child.stdout.readline()
            child.kill()
            await child.communicate()
        free, _ = torch.cuda.mem_get_info()
        await loader.evict(ref.id, NVME)
        assert torch.cuda.mem_get_info()[0] >= free + SIZE_BYTES - CHUNK_BYTES


def test_more_than_the_gpu_has() -> None:
    gpu = Cuda((0,))
    gpu.start(Staging(2))
    with pytest.raises(OutOfSpace, match="GPU 0"):
        gpu.allocate(0, 1 << 42)
    gpu.close()
    gpu.close()


@pytest.mark.usefixtures("_two_gpus")
async def test_layers_over_two_gpus(node):
    ref = await node.publish()
    budget = SIZE_BYTES * 2 // 3
    async with node.loader(device_numbers=(0, 1), device_budget_bytes=budget) as loader:
        (await loader.load(ref, NVME)).release()
        async with await loader.load(ref, DEVICE) as resident:
            assert resident.device is not None
            parts = resident.device.weights.parts
            assert [tensor_of(memory).device.index for _, memory in parts] == [0, 1]
            assert bytes_of(resident.device.weights) == node.data
