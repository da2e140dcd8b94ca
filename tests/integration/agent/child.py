"""An agent in a process of its own, to be killed: `python child.py ROOT RUN_DIR DRAM_DIR`."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import uvloop

from serverlessllm.testing.agents import Machine


async def main() -> None:
    root, run_dir, dram_dir = (Path(argument) for argument in sys.argv[1:4])
    async with Machine(root, run_dir, dram_dir).agent() as agent:
        print(agent.address, flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main())
