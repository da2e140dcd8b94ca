"""From what agents report to what the score needs: figures learned, bytes to move, bandwidth."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from serverlessllm.core.cluster import AgentRecord, CacheLevel, ModelOnAgent
from serverlessllm.core.ids import ModelId
from serverlessllm.core.lifecycle import InstanceState
from serverlessllm.core.units import MIB
from serverlessllm.scheduler.choose import Candidate, Exclusion
from serverlessllm.scheduler.score import Weights
from serverlessllm.scheduler.settings import SchedulerSettings

SAMPLE_BYTES_MIN = MIB
"""A shorter transfer says more about latency than about bandwidth."""

_STORE_HOPS = ("store→nvme", "store→dram")
_NVME_HOPS = ("nvme→dram",)
_DEVICE_HOPS = ("dram→device",)
_ENDED = frozenset({InstanceState.DRAINING, InstanceState.STOPPED, InstanceState.FAILED})


def learn(previous: float | None, sample: float, gain: float) -> float:
    """The exponential average after one more sample; the first sample is taken whole."""
    return sample if previous is None else previous + gain * (sample - previous)


def learn_bandwidth(
    previous_bytes_s: float | None, bytes_moved: int, seconds: float, gain: float
) -> float | None:
    """The average bandwidth after one more transfer; one too short to tell changes nothing."""
    if bytes_moved < SAMPLE_BYTES_MIN or seconds <= 0:
        return previous_bytes_s
    return learn(previous_bytes_s, bytes_moved / seconds, gain)


def requests_ahead(held: int, slots: int) -> int:
    """How many requests a new one waits behind, on an instance that runs `slots` at once.

    This is the score's `queue_len`: requests that share the batch do not delay each other, so one
    slot counts every request held, and four slots count none before the fourth.
    """
    return max(0, held - max(1, slots) + 1)


def maps_in_place(devices: Iterable[str]) -> bool:
    """Whether the engine maps DRAM itself, so that no byte moves from there to the device."""
    return all(device.startswith("cpu") for device in devices)


def bytes_to_move(cache_level: CacheLevel, size_bytes: int, devices: Iterable[str]) -> int:
    """Bytes that still have to move to the agent's device."""
    if cache_level is CacheLevel.DEVICE:
        return 0
    if cache_level is CacheLevel.DRAM and maps_in_place(devices):
        return 0
    return size_bytes


def slowest_hop_bytes_s(
    cache_level: CacheLevel,
    bandwidth: Mapping[str, float],
    devices: Iterable[str],
    settings: SchedulerSettings,
) -> float:
    """Bandwidth of the slowest hop between where the bytes lie and the device; > 0.

    From the store only the way into DRAM counts for a start (the NVMe copy is written behind it);
    where both are known the slower one is taken, to be safe.
    """
    hops: list[float] = []
    if cache_level is CacheLevel.STORE:
        hops.append(_measured(bandwidth, _STORE_HOPS, settings.store_bytes_s))
    if cache_level is CacheLevel.NVME:
        hops.append(_measured(bandwidth, _NVME_HOPS, settings.nvme_bytes_s))
    if not maps_in_place(devices) or not hops:
        hops.append(_measured(bandwidth, _DEVICE_HOPS, settings.device_bytes_s))
    return min(hops)


def _measured(bandwidth: Mapping[str, float], hops: tuple[str, ...], assumed: float) -> float:
    return min((bandwidth[hop] for hop in hops if bandwidth.get(hop, 0.0) > 0), default=assumed)


def _evicted_bytes(agent: AgentRecord, cache_level: CacheLevel, size_bytes: int) -> int:
    """What the agent's DRAM tier must give up to take the checkpoint in."""
    if cache_level <= CacheLevel.DRAM:
        return 0
    return max(0, size_bytes - (agent.dram.budget_bytes - agent.dram.used_bytes))


def candidate(
    agent: AgentRecord,
    model: ModelId,
    *,
    size_bytes: int,
    backend: str | None,
    settings: SchedulerSettings,
    held: int | None = None,
    refused: str | None = None,
) -> Candidate:
    """One agent as a candidate for `model` (`size_bytes` of checkpoint).

    `backend` names the backend that the model needs (None: any). `held`: requests this
    orchestrator knows the agent to hold, where that is newer than the record. `refused`: why the
    agent refused this very request before.
    """
    known = next((m for m in agent.models if m.model == model), None) or ModelOnAgent(model=model)
    level = known.cache_level
    slots = max(1, known.slots)
    move_bytes = bytes_to_move(level, size_bytes, agent.devices)
    queue = known.queue_len if held is None else held
    excluded, reason = _exclusion(agent, known, size_bytes, backend, refused)
    return Candidate(
        agent=agent.agent,
        cache_level=level,
        kv_hit_rate=min(1.0, max(0.0, known.kv_hit_rate)),
        queue_len=requests_ahead(max(0, queue), slots),
        size_bytes=move_bytes,
        bandwidth_bytes_s=slowest_hop_bytes_s(level, agent.bandwidth, agent.devices, settings),
        start_s=known.start_s,
        service_s=known.service_s,
        slots=slots,
        running=known.state is not None and known.state not in _ENDED,
        evicted_bytes=_evicted_bytes(agent, level, size_bytes),
        excluded=excluded,
        reason=reason,
    )


def _exclusion(
    agent: AgentRecord,
    known: ModelOnAgent,
    size_bytes: int,
    backend: str | None,
    refused: str | None,
) -> tuple[Exclusion | None, str]:
    if refused is not None:
        return Exclusion.REFUSED, refused
    if not agent.accepting:
        return Exclusion.NOT_ACCEPTING, "the agent drains"
    if backend is not None and backend not in agent.backends:
        return Exclusion.NO_BACKEND, f"backend {backend} is not installed there"
    # What is in use now may be idle: only the agent knows whom it can unload for this one.
    room = agent.dram.budget_bytes
    if known.cache_level > CacheLevel.DRAM and size_bytes > room:
        return Exclusion.NO_ROOM, f"{size_bytes} bytes needed, {room} in the whole DRAM tier"
    return None, ""


def weights(settings: SchedulerSettings, candidates: Iterable[Candidate]) -> Weights:
    """The weights of one decision: what is set, else learned from what the agents measured.

    One set for all candidates, so that scores compare; each is a mean over those who know.
    """
    starts: list[float] = []
    services: list[float] = []
    per_slot: list[float] = []
    for c in candidates:
        if c.start_s is not None:
            starts.append(c.start_s)
        if c.service_s is not None:
            services.append(c.service_s)
            per_slot.append(c.service_s / c.slots)
    service_s = _mean(services, settings.service_s)
    return Weights(
        alpha_s=_mean(starts, settings.start_s) if settings.alpha_s is None else settings.alpha_s,
        beta_s=service_s * settings.prefill_share if settings.beta_s is None else settings.beta_s,
        gamma_s=_mean(per_slot, service_s) if settings.gamma_s is None else settings.gamma_s,
        delta=settings.delta,
    )


def _mean(values: list[float], unknown: float) -> float:
    # In order of size: a float sum depends on the order, and a decision must not.
    return sum(sorted(values)) / len(values) if values else unknown


def predict_ttft_s(
    candidate: Candidate, settings: SchedulerSettings, *, first_token_s: float = 0.0
) -> float:
    """Seconds until the first token from this agent, as far as is known now.

    Waiting, moving and starting, each once: the score orders agents, this one is to be measured
    against the clock. `first_token_s` is what a warm, idle instance takes.
    """
    service_s = settings.service_s if candidate.service_s is None else candidate.service_s
    start_s = settings.start_s if candidate.start_s is None else candidate.start_s
    wait_s = candidate.queue_len * service_s / candidate.slots
    if candidate.cache_level is CacheLevel.DEVICE:
        return wait_s + first_token_s
    return wait_s + candidate.size_bytes / candidate.bandwidth_bytes_s + start_s + first_token_s
