"""Instances forked from a template: the same contract as an executed one; and what goes wrong."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import signal
import subprocess
import sys
import termios
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path

import msgspec
import pytest
import uvloop

from serverlessllm.backends.base import READY_FD, WEIGHTS_FD, LaunchPlan
from serverlessllm.backends.orphans import kill_orphans
from serverlessllm.backends.process import BackendProcess
from serverlessllm.backends.procfs import read_stat, session_members
from serverlessllm.backends.settings import BackendSettings
from serverlessllm.backends.template import Template
from serverlessllm.backends.templates import Templates
from serverlessllm.core.clock import Clock, SystemClock
from serverlessllm.core.errors import LoadFailed
from serverlessllm.core.ids import Address
from serverlessllm.edge.settings import UpstreamSettings
from serverlessllm.edge.upstream import Upstreams
from serverlessllm.testing.clock import VirtualClock
from serverlessllm.testing.descriptors import open_descriptors
from serverlessllm.testing.waiting import eventually, eventually_blocking

SETTINGS = BackendSettings(
    term_s=0.3, log_tail_lines=10, template_restart_s_min=0.01, template_fork_timeout_s=30.0
)
ENGINES = "serverlessllm.testing.engines"
ENVIRON = os.environ | {"AWS_SECRET_ACCESS_KEY": "s", "LC_ALL": "C.UTF-8"}
SLEEP = "import time; print('up', flush=True); time.sleep(60)"
MakeTemplates = Callable[..., Templates]
Start = Callable[..., BackendProcess]

READY = """
import http.server, os, socketserver
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()
    def address_string(self): return ""
    def log_message(self, *_): pass
server = socketserver.UnixStreamServer("s.sock", Handler)
os.write(int(os.environ["SLLM_READY_FD"]), b"\\n")
server.serve_forever()
"""

AGENT = """
import asyncio, os, pathlib, signal, sys
from serverlessllm.backends.base import LaunchPlan
from serverlessllm.backends.process import BackendProcess
from serverlessllm.backends.settings import BackendSettings
from serverlessllm.backends.templates import Templates
from serverlessllm.core.clock import SystemClock
from serverlessllm.testing.waiting import eventually
async def main():
    run = pathlib.Path(sys.argv[1])
    (run / "one").mkdir(parents=True)
    settings, clock = BackendSettings(), SystemClock()
    templates = Templates(settings, clock=clock, environ=os.environ, run_dir=run, log_dir=run,
        package="serverlessllm.testing.engines")
    process = BackendProcess(
        LaunchPlan(command=("true", "import time; print('up', flush=True); time.sleep(60)"),
            address="unix:/none", template="script"),
        run_dir=run / "one", log_path=run / "log", environ=os.environ, settings=settings,
        clock=clock, templates=templates)
    await eventually(lambda: process.log_tail == ("up",))
    keeper = next(iter(templates._alive))._keeper.pid
    children = pathlib.Path(f"/proc/{keeper}/task/{keeper}/children")
    await eventually(lambda: len(children.read_text().split()) >= 3)
    print(keeper, *children.read_text().split(), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(main())
"""


@pytest.fixture
async def make_templates(tmp_path: Path) -> AsyncIterator[MakeTemplates]:
    made: list[Templates] = []

    def make(clock: Clock | None = None, **settings: object) -> Templates:
        templates = Templates(
            msgspec.structs.replace(SETTINGS, **settings),
            clock=clock or SystemClock(),
            environ=ENVIRON,
            run_dir=tmp_path,
            log_dir=tmp_path,
            package=ENGINES,
        )
        made.append(templates)
        return templates

    yield make
    for templates in made:
        await templates.close()
        assert not templates._alive


@pytest.fixture
def templates(make_templates: MakeTemplates) -> Templates:
    return make_templates()


@pytest.fixture
async def start(tmp_path: Path, templates: Templates) -> AsyncIterator[Start]:
    """Start the script from a template; executed, it prints 'executed' first."""
    started: list[BackendProcess] = []

    def start(
        script: str,
        *,
        of: Templates | None = None,
        clock: Clock | None = None,
        descriptors: dict[str, int] | None = None,
        **plan: object,
    ) -> BackendProcess:
        run_dir = tmp_path / f"run{len(started)}"
        run_dir.mkdir()
        executed = "import sys; print('executed', flush=True); exec(sys.argv[1])"
        default = LaunchPlan(
            command=(sys.executable, "-I", "-c", executed, script),
            environment={"ASKED": "yes"},
            address=Address(f"unix:{run_dir}/s.sock"),
            template="script",
        )
        process = BackendProcess(
            msgspec.structs.replace(default, **plan),
            run_dir=run_dir,
            log_path=tmp_path / f"{run_dir.name}.log",
            environ=ENVIRON,
            settings=SETTINGS,
            clock=clock or SystemClock(),
            descriptors=descriptors,
            templates=of or templates,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        await process.stop()


@pytest.fixture
async def client() -> AsyncIterator[Upstreams]:
    upstreams = Upstreams(UpstreamSettings(), SystemClock())
    yield upstreams
    await upstreams.close()


async def said(process: BackendProcess, *lines: str) -> None:
    """Return when these lines, and no others, are what it has printed."""
    await eventually(lambda: process.log_tail == lines)


async def of(templates: Templates) -> Template:
    """The one template, once it is ready."""
    await eventually(lambda: any(each.pid for each in templates._alive))
    (template,) = (each for each in templates._alive if each.pid)
    return template


def children(pid: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_gone(pid: int) -> bool:
    stat = read_stat(pid)
    return stat is None or stat.state == "Z"


class TestContract:
    """What an executed process does, a forked one does."""

    async def test_it_becomes_ready_and_stops(
        self, start: Start, templates: Templates, client: Upstreams, tmp_path: Path
    ) -> None:
        process = start(READY, tells_ready=True)
        await process.wait_ready(client)
        assert process.pid in children((await of(templates))._keeper.pid)
        await process.stop()
        assert process.exited.result() == -signal.SIGTERM
        await eventually(lambda: read_stat(process.pid) is None)
        assert not (tmp_path / "run0").exists()

    @pytest.mark.parametrize(
        ("script", "status"),
        [
            ("pass", 0),
            ("raise SystemExit(7)", 7),
            ("raise ValueError('bad weights')", 1),
            ("import os; os.kill(os.getpid(), 11)", -signal.SIGSEGV),
        ],
    )
    async def test_its_end_is_told(self, start: Start, script: str, status: int) -> None:
        process = start(script)
        assert await process.exited == status
        assert ("ValueError: bad weights" in process.log_tail) == ("bad weights" in script)
        assert "executed" not in process.log_tail

    async def test_ending_before_ready_is_a_failed_load_with_its_status(
        self, start: Start, client: Upstreams
    ) -> None:
        process = start("import sys; print('no such model'); sys.exit(7)", tells_ready=True)
        with pytest.raises(LoadFailed, match="status 7"):
            await process.wait_ready(client)
        assert process.log_tail == ("no such model",)

    async def test_it_leads_a_session_that_ends_whole(self, start: Start) -> None:
        process = start(
            "import os, signal, time\n"
            "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
            "os.fork()\n"
            "print('deaf', flush=True); time.sleep(60)"
        )
        await said(process, "deaf", "deaf")
        assert os.getsid(process.pid) == os.getpgid(process.pid) == process.pid
        await process.stop()
        assert process.exited.result() == -signal.SIGKILL
        await eventually(lambda: not list(session_members(process.pid)))
        await process.stop()

    async def test_children_do_not_outlive_a_leader_that_crashes(
        self, start: Start, templates: Templates
    ) -> None:
        process = start("import os, time\nif os.fork(): os._exit(1)\ntime.sleep(60)")
        assert await process.exited == 1
        await eventually(lambda: not list(session_members(process.pid)))
        # The keeper adopts what an instance leaves, and does not keep the dead.
        await at_rest(await of(templates))

    async def test_it_finds_its_setting_and_nothing_of_the_template(
        self, start: Start, tmp_path: Path
    ) -> None:
        weights = tmp_path / "weights"
        weights.write_text("the weights")
        source = weights.open()
        process = start(
            "import json, os, signal, sys\n"
            "fds = {int(fd) for fd in os.listdir('/proc/self/fd')}\n"
            "print(json.dumps({'env': dict(os.environ), 'cwd': os.getcwd(),\n"
            " 'argv': len(sys.argv),\n"
            " 'fds': [fd for fd in fds if os.path.exists(f'/proc/self/fd/{fd}')],\n"
            " 'masked': len(signal.pthread_sigmask(signal.SIG_BLOCK, ())),\n"
            " 'weights': os.read(int(os.environ['SLLM_WEIGHTS_FD']), 99).decode(),\n"
            " 'stdin': os.readlink('/proc/self/fd/0'),\n"
            " 'privs': 'NoNewPrivs:\\t1' in open('/proc/self/status').read()}))",
            descriptors={WEIGHTS_FD: source.fileno()},
            tells_ready=True,
        )
        source.close()  # it has its own
        assert await process.exited == 0
        found = json.loads((tmp_path / "run0.log").read_text())
        environment = found["env"]
        assert found["weights"] == "the weights"
        assert set(found["fds"]) == {
            *(0, 1, 2),
            int(environment.pop(READY_FD)),
            int(environment.pop(WEIGHTS_FD)),
        }
        assert environment.pop("ASKED") == "yes"
        assert environment.pop("LC_ALL") == "C.UTF-8"
        assert environment.keys() <= {"PATH", "HOME", "LANG", "TZ", "TMPDIR", "VIRTUAL_ENV"}
        assert found["cwd"] == str(tmp_path / "run0")
        assert found["argv"] == 2
        assert found["masked"] == 0
        assert found["stdin"] == os.devnull
        assert found["privs"]

    async def test_chance_differs_between_forks(self, start: Start) -> None:
        script = "import random, uuid; print(random.random(), uuid.uuid4())"
        one, two = start(script), start(script)
        await asyncio.gather(one.exited, two.exited)
        assert one.log_tail != two.log_tail

    async def test_a_flood_of_output_is_drained(self, start: Start) -> None:
        process = start("for n in range(40000): print('line', n)\nprint('over')")
        async with asyncio.timeout(30):
            assert await process.exited == 0
        await process.stop()
        assert process.log_tail[-1] == "over"

    async def test_many_at_once(self, start: Start, templates: Templates) -> None:
        processes = [start(f"raise SystemExit({number})") for number in range(12)]
        assert await asyncio.gather(*(each.exited for each in processes)) == list(range(12))
        assert all(each.log_tail == () for each in processes)  # nobody was executed
        await at_rest(await of(templates))

    async def test_descriptors_reach_an_executed_one_too(self, start: Start) -> None:
        reading, writing = os.pipe()
        process = start(
            "import os; os.write(int(os.environ['SAY_FD']), b'hello')",
            template=None,
            descriptors={"SAY_FD": writing},
        )
        os.close(writing)
        assert await process.exited == 0
        assert os.read(reading, 9) == b"hello"
        assert os.read(reading, 9) == b""  # nobody has kept it
        os.close(reading)

    async def test_nothing_is_left_open(
        self, start: Start, templates: Templates, client: Upstreams
    ) -> None:
        open_before = open_descriptors()
        for script in (READY, "raise SystemExit(7)"):
            process = start(script, tells_ready=True)
            if script == READY:
                await process.wait_ready(client)
                await client.close()
            else:
                await process.exited
            await process.stop()
        await templates.close()
        assert open_descriptors() <= open_before

    def test_it_works_on_uvloop_too(self, tmp_path: Path) -> None:
        async def main() -> int:
            templates = Templates(
                SETTINGS,
                clock=SystemClock(),
                environ=ENVIRON,
                run_dir=tmp_path,
                log_dir=tmp_path,
                package=ENGINES,
            )
            (tmp_path / "run").mkdir()
            process = BackendProcess(
                LaunchPlan(
                    command=("false", "print('out'); raise SystemExit(3)"),
                    address=Address("unix:/none"),
                    template="script",
                ),
                run_dir=tmp_path / "run",
                log_path=tmp_path / "backend.log",
                environ=ENVIRON,
                settings=SETTINGS,
                clock=SystemClock(),
                templates=templates,
            )
            status = await process.exited
            await process.stop()
            await templates.close()
            return status

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            assert runner.run(main()) == 3
        assert (tmp_path / "backend.log").read_text() == "out\n"


class TestCancellation:
    """Whoever stops waiting leaves nothing behind."""

    async def test_before_the_template_is_ready(self, start: Start, templates: Templates) -> None:
        process = start(SLEEP)
        await asyncio.sleep(0)
        await process.stop()
        await at_rest(await of(templates))
        assert process.log_tail == ()

    async def test_while_it_forks(self, start: Start, templates: Templates) -> None:
        template = await ready(templates)
        await freeze(template)
        process = start(SLEEP)
        await eventually(lambda: is_asked(template))
        await process.stop()
        for pid in children(template._keeper.pid):
            os.kill(pid, signal.SIGCONT)
        other = start("print('forked')")
        assert await other.exited == 0
        # Requests are served in order: the first one's fork asked for leave, and did not get it.
        await at_rest(template)
        assert process.log_tail == ()

    async def test_a_wait_that_is_given_up(self, start: Start, client: Upstreams) -> None:
        process = start(SLEEP, tells_ready=True)
        waiting = asyncio.ensure_future(process.wait_ready(client))
        await said(process, "up")
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await process.stop()
        await eventually(lambda: read_stat(process.pid) is None)


async def ready(templates: Templates) -> Template:
    """Have the template ready."""
    templates.warm("script")
    return await of(templates)


async def freeze(template: Template) -> None:
    """Stop it and what it has at hand: no request is read from now on."""
    await at_rest(template)
    for pid in children(template._keeper.pid):
        os.kill(pid, signal.SIGSTOP)
        await eventually(partial(is_stopped, pid))


def is_stopped(pid: int) -> bool:
    stat = read_stat(pid)
    return stat is not None and stat.state == "T"


async def at_rest(template: Template) -> None:
    """Return when there is nobody but the template and the one fork that it has at hand."""

    def alone() -> bool:
        adopted = children(template._keeper.pid)
        return len(adopted) == 2 and template.pid in adopted and not children(template.pid)

    await eventually(alone)


def is_asked(template: Template) -> bool:
    """A request is on its way to it: bytes that it has not read."""
    unread = fcntl.ioctl(template._requests, termios.TIOCOUTQ, b"\0" * 4)
    return int.from_bytes(unread, sys.byteorder) > 0


class TestDeath:
    """Of the template, of its keeper, of the agent."""

    async def test_instances_outlive_the_template_and_another_one_comes(
        self, start: Start, templates: Templates
    ) -> None:
        process = start(SLEEP)
        await said(process, "up")
        first = await of(templates)
        os.kill(first.pid, signal.SIGKILL)
        await eventually(first.ended.is_set)
        await eventually(lambda: len(templates._alive) == 2)
        (second,) = templates._alive - {first}
        await eventually(lambda: second.pid > 0)
        other = start(SLEEP)
        await said(other, "up")
        assert other.pid in children(second._keeper.pid)
        assert not process.exited.done()
        os.kill(process.pid, signal.SIGKILL)
        assert await process.exited == -signal.SIGKILL
        await eventually(first.gone.done)  # its keeper leaves after its last child

    async def test_in_the_pause_after_its_death_the_command_is_executed(
        self, start: Start, make_templates: MakeTemplates
    ) -> None:
        templates = make_templates(template_restart_s_min=600.0)
        os.kill((await ready(templates)).pid, signal.SIGKILL)
        await eventually(lambda: not templates._alive)
        process = start("print('up')", of=templates)
        assert await process.exited == 0
        assert process.log_tail == ("executed", "up")

    async def test_dying_while_it_is_asked_the_command_is_executed(
        self, start: Start, templates: Templates
    ) -> None:
        template = await ready(templates)
        await freeze(template)
        process = start("print('up')")
        await eventually(lambda: is_asked(template))
        for pid in children(template._keeper.pid):
            os.kill(pid, signal.SIGKILL)
        assert await process.exited == 0
        assert process.log_tail == ("executed", "up")

    async def test_instances_die_with_the_keeper_and_that_is_told(
        self, start: Start, templates: Templates
    ) -> None:
        process = start(SLEEP)
        await said(process, "up")
        os.kill((await of(templates))._keeper.pid, signal.SIGKILL)
        assert await process.exited == -signal.SIGKILL
        await eventually(lambda: is_gone(process.pid))

    async def test_what_instances_started_dies_with_the_keeper_too(
        self, start: Start, templates: Templates
    ) -> None:
        process = start("import os, time\nos.fork()\nprint('up', flush=True); time.sleep(60)")
        await said(process, "up", "up")
        os.kill((await of(templates))._keeper.pid, signal.SIGKILL)
        assert await process.exited == -signal.SIGKILL
        await eventually(lambda: not list(session_members(process.pid)))

    async def test_each_is_called_what_it_is(self, start: Start, templates: Templates) -> None:
        process = start(SLEEP)
        await said(process, "up")
        keeper = (await of(templates))._keeper.pid

        def names() -> list[str]:
            pids = (keeper, *children(keeper))
            return sorted(Path(f"/proc/{pid}/comm").read_text().strip() for pid in pids)

        roles = ["fork", "instance", "keeper", "template"]
        await eventually(lambda: names() == [f"sllm-{role}" for role in roles])
        status = Path(f"/proc/{process.pid}/status").read_text()
        assert "NoNewPrivs:\t1" in status

    async def test_closing_ends_all(self, start: Start, templates: Templates) -> None:
        process = start(SLEEP)
        await said(process, "up")
        template = await of(templates)
        await templates.close()
        assert process.exited.result() == -signal.SIGKILL
        await eventually(lambda: is_gone(process.pid) and is_gone(template.pid))
        assert read_stat(template._keeper.pid) is None
        templates.warm("script")
        other = start("print('up')")
        assert await other.exited == 0
        assert other.log_tail == ("executed", "up")

    def test_all_die_with_the_agent_and_are_recorded(self, tmp_path: Path) -> None:
        run_dir = tmp_path / "agent"
        agent = subprocess.run(
            [sys.executable, "-c", AGENT, str(run_dir)], capture_output=True, text=True, timeout=60
        )
        pids = [int(pid) for pid in agent.stdout.split()]
        assert len(pids) == 4, agent.stderr  # keeper, template, instance, the fork at hand
        for pid in pids:
            eventually_blocking(partial(is_gone, pid))
        assert len(list(run_dir.glob("*/process.json"))) == 2
        kill_orphans(run_dir)
        assert not list(run_dir.glob("*/"))


class TestUnfit:
    """A template that is no good costs no instance its start."""

    @pytest.mark.parametrize(
        ("module", "reason"),
        [
            ("failing", "ImportError: no module named torch"),
            ("threaded", "its imports started 1 threads, which a fork would not have"),
            ("holding", "its imports left open what forks would share: /dev/null"),
            ("absent", f"No module named '{ENGINES}.absent'"),
        ],
    )
    async def test_imports_that_go_wrong(
        self,
        start: Start,
        templates: Templates,
        module: str,
        reason: str,
        tmp_path: Path,
    ) -> None:
        process = start("print('up')", template=module)
        assert await process.exited == 0
        assert process.log_tail == ("executed", "up")
        await templates.close()
        assert reason in (tmp_path / f"template-{module}.log").read_text()

    async def test_imports_that_hang(
        self, start: Start, make_templates: MakeTemplates, tmp_path: Path
    ) -> None:
        templates = make_templates(template_start_timeout_s=0.05, template_restart_s_min=600.0)
        process = start("print('up')", template="hanging", of=templates)
        assert await process.exited == 0
        assert process.log_tail == ("executed", "up")
        await eventually(lambda: not templates._alive)
        assert not list(tmp_path.glob("template-*/"))

    async def test_a_launch_waits_for_imports_only_so_long(
        self, start: Start, make_templates: MakeTemplates
    ) -> None:
        templates = make_templates(template_wait_s=0.05)
        process = start("print('up')", template="hanging", of=templates)
        assert await process.exited == 0
        assert process.log_tail == ("executed", "up")

    async def test_one_that_hangs_when_it_is_asked_is_replaced(
        self, start: Start, make_templates: MakeTemplates
    ) -> None:
        templates = make_templates(template_fork_timeout_s=0.05)
        template = await ready(templates)
        await freeze(template)
        process = start("print('up')", of=templates)
        assert await process.exited == 0
        assert process.log_tail == ("executed", "up")
        await eventually(template.ended.is_set)

    async def test_a_fork_that_hangs_is_killed_and_the_command_executed(
        self, start: Start, templates: Templates, client: Upstreams
    ) -> None:
        template = await ready(templates)
        hangs_if_forked = (
            "import os, signal\nif os.getppid() == {}: print(os.getpid(), flush=True); "
            "signal.pause()\n" + READY
        ).format(template._keeper.pid)
        clock = VirtualClock()
        process = start(hangs_if_forked, clock=clock, tells_ready=True)
        await eventually(lambda: process.log_tail and clock.sleepers)
        (hung,) = process.log_tail
        await clock.advance(SETTINGS.template_ready_timeout_s)
        await process.wait_ready(client)
        assert process.log_tail == (hung, "executed")
        assert read_stat(int(hung)) is None
        await eventually(template.ended.is_set)
        assert not process.exited.done()

    async def test_an_argument_too_long_for_a_request_is_executed(self, start: Start) -> None:
        process = start("print('up')" + " " * 130_950)
        assert await process.exited == 0
        assert process.log_tail == ("executed", "up")

    async def test_what_cannot_be_executed_either_is_a_failed_load(
        self, start: Start, client: Upstreams
    ) -> None:
        process = start("", template="failing", command=("my-server", ""))
        with pytest.raises(LoadFailed, match="'my-server' cannot be started: no such program"):
            await process.wait_ready(client)


class TestRoom:
    """How many there are, and for how long."""

    async def test_an_idle_one_is_ended_and_its_instances_are_not(
        self, start: Start, make_templates: MakeTemplates
    ) -> None:
        clock = VirtualClock()
        templates = make_templates(clock)
        process = start(SLEEP, of=templates)
        await said(process, "up")
        (template,) = templates._alive
        await clock.advance(SETTINGS.template_idle_s)
        await eventually(template.ended.is_set)
        await eventually(lambda: children(template._keeper.pid) == [process.pid])
        assert not process.exited.done()
        await process.stop()
        await eventually(template.gone.done)

    async def test_the_least_recently_used_makes_room(
        self, start: Start, make_templates: MakeTemplates
    ) -> None:
        templates = make_templates(templates_max=1)
        first = await ready(templates)
        templates.warm("hanging")
        await eventually(lambda: first.gone.done() and first not in templates._alive)
        assert len(templates._alive) == 1
        other = start("print('up')", of=templates)
        assert await other.exited == 0
        assert other.log_tail == ("up",)

    async def test_warming_again_changes_nothing(self, templates: Templates) -> None:
        template = await ready(templates)
        templates.warm("script")
        assert templates._alive == {template}
