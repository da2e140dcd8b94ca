"""Another process of the machine: opens weights by their handle, a JSON line on stdin, prints the
digest of each part, and holds them until stdin ends."""

from __future__ import annotations

import sys

import msgspec
import torch
from blake3 import blake3

from serverlessllm.loader.device import Opened
from serverlessllm.loader.weights import DeviceHandle


def main() -> None:
    handle = msgspec.json.decode(sys.stdin.readline(), type=DeviceHandle)
    opened = Opened(handle)
    for _, memory in opened.parts:
        before = torch.cuda.memory_allocated(memory.device)
        sys.stdout.write(blake3(memory.cpu().numpy().tobytes()).hexdigest() + "\n")
        assert before == 0  # nothing of it was copied to see it
    sys.stdout.flush()
    sys.stdin.read()
    opened.close()


if __name__ == "__main__":
    main()
