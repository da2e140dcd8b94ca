"""Template processes: each holds one engine's imports, so that an instance's start is a fork.

`inside/template.py` is what runs there. A template is a convenience: whatever is wrong with it, the
instance is executed instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from serverlessllm.backends.child import Child, Setting
from serverlessllm.backends.settings import BackendSettings
from serverlessllm.core.clock import Clock

PACKAGE = "serverlessllm.backends.inside"


class Templates:
    """The template processes of an agent, at most one for each module. One event loop only."""

    def __init__(
        self,
        settings: BackendSettings,
        *,
        clock: Clock,
        environ: Mapping[str, str],
        run_dir: Path,
        log_dir: Path,
        package: str = PACKAGE,
    ) -> None:
        """`run_dir` is the agent's; a directory for each template is made in it. `package` is
        where the modules are looked up."""

    def warm(self, module: str) -> None:
        """Have a template of this module soon. At once, and nothing if there is one."""

    async def fork(self, module: str, argument: str, setting: Setting) -> Child | None:
        """An instance that runs the module's `main(argument)`; None when the template cannot
        give one in time: execute it then."""
        return None

    def distrust(self, module: str) -> None:
        """A fork of the template hangs: replace the template, after a pause."""

    async def close(self) -> None:
        """End the templates, and with them every instance that they forked. Idempotent."""
