"""An agent whose instances are forks of a template."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from serverlessllm.agent.instance import Instance
from serverlessllm.backends.procfs import read_stat
from serverlessllm.backends.settings import BackendSettings
from serverlessllm.core.lifecycle import InstanceState
from serverlessllm.testing.agents import AgentClient, Machine, fake_spec
from serverlessllm.testing.waiting import eventually

PROCESSES = BackendSettings(template_restart_s_min=0.01, templates_preload=("fake",))


def pids(agent: AgentClient) -> dict[str, int]:
    """Of the instances, by model."""
    return {each.model: _pid(each) for each in agent.agent._instances.all()}


def _pid(instance: Instance) -> int:
    assert instance.process is not None
    return instance.process.pid


def keeper(pid: int) -> int:
    """The parent: not the agent itself."""
    parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    assert parent != os.getpid()
    assert "inside.template" in Path(f"/proc/{parent}/cmdline").read_text()
    return parent


async def test_instances_are_forks_that_live_and_end_as_others_do(machine: Machine) -> None:
    async with machine.agent(processes=PROCESSES) as agent:
        for name in ("one", "two"):
            event = await agent.load(fake_spec(name, template=True))
            assert event.state == InstanceState.READY
            assert (await agent.chat(name))[0] == 200
        first, second = pids(agent)["one"], pids(agent)["two"]
        assert keeper(first) == keeper(second)
        os.kill(first, signal.SIGKILL)  # noticed, and no harm to the other
        await eventually(lambda: list(pids(agent)) == ["two"])
        assert (await agent.chat("two"))[0] == 200
        assert await agent.unload("two") == 200
        await eventually(lambda: read_stat(second) is None)
        again = await agent.load(fake_spec("two", template=True))
        assert again.state == InstanceState.READY
        last, parent = pids(agent)["two"], keeper(pids(agent)["two"])
    assert read_stat(parent) is None
    await eventually(lambda: (stat := read_stat(last)) is None or stat.state == "Z")


async def test_a_template_that_is_killed_costs_no_model_its_service(machine: Machine) -> None:
    async with machine.agent(processes=PROCESSES) as agent:
        await agent.load(fake_spec("one", template=True))
        (template,) = agent.agent._templates._alive
        os.kill(template.pid, signal.SIGKILL)
        await eventually(template.ended.is_set)
        assert (await agent.chat("one"))[0] == 200
        event = await agent.load(fake_spec("two", template=True))
        assert event.state == InstanceState.READY
        assert (await agent.chat("two"))[0] == 200


async def test_one_that_fails_its_start_is_reported_as_ever(machine: Machine) -> None:
    async with machine.agent(processes=PROCESSES) as agent:
        event = await agent.load(fake_spec(template=True, fail_start=True))
        assert event.state == InstanceState.FAILED
        assert event.error is not None
        assert "ended with status 1 before it was ready" in event.error.message
