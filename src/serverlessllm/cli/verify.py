"""`sllm verify`: prove that a checkpoint's bytes are what its index says."""

from __future__ import annotations

from serverlessllm.cli import options
from serverlessllm.cli.failure import Failure
from serverlessllm.cli.local import Checkpoint, open_local


def verify(
    checkpoint: Checkpoint,
    data_dir: options.DataDir = None,
    config: options.Config = None,
    json: options.Json = False,
) -> None:
    """Read a whole checkpoint and check every digest."""
    import time

    from serverlessllm.checkpoint.reader import verify as verify_bin
    from serverlessllm.cli.output import print_json
    from serverlessllm.core.errors import CheckpointError
    from serverlessllm.core.units import format_size

    found = open_local(checkpoint, data_dir, config)
    if not found.bin_path.exists():
        raise Failure(f"{found.bin_path}: no such file", "pull or convert the model again")
    started_s = time.monotonic()
    try:
        verify_bin(found.bin_path, found.contents)
    except CheckpointError as error:
        raise Failure(
            error.message, f"{found.bin_path} is damaged: remove it and pull or convert it again"
        ) from error
    except OSError as error:
        raise Failure(f"{found.bin_path}: {error.strerror}") from error
    seconds = time.monotonic() - started_s
    size_bytes = found.contents.size_bytes
    if json:
        print_json({"checkpoint": found.id, "size_bytes": size_bytes, "seconds": seconds})
        return
    rate = format_size(size_bytes / seconds)
    print(f"{found.id}: {format_size(size_bytes)} verified in {seconds:.2f} s ({rate}/s)")
