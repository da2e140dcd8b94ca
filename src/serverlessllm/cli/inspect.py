"""`sllm inspect`: what is in a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from serverlessllm.cli import options
from serverlessllm.cli.local import Checkpoint, LocalCheckpoint, open_local

if TYPE_CHECKING:
    from serverlessllm.checkpoint.index import Index, Quantization, Tensor


def inspect(
    checkpoint: Checkpoint,
    tensors: Annotated[
        bool, typer.Option("--tensors", help="Every tensor, not only the layers.")
    ] = False,
    digests: Annotated[bool, typer.Option("--digests", help="Every chunk's digests.")] = False,
    data_dir: options.DataDir = None,
    config: options.Config = None,
    json: options.Json = False,
) -> None:
    """Show a checkpoint: layers, tensors, sizes, digests."""
    found = open_local(checkpoint, data_dir, config)
    if json:
        # The `.idx` is JSON already: what `jq` reads is the file itself.
        print(found.index_path.read_text(encoding="utf-8"), end="")
        return
    _print_head(found)
    _print_layers(found.contents, tensors=tensors)
    if digests:
        _print_digests(found.contents)


def _print_head(found: LocalCheckpoint) -> None:
    from serverlessllm.core.units import format_size

    index = found.contents
    facts = {
        "checkpoint": found.id,
        "model": f"{index.model}@{index.revision}",
        "source": index.source,
        "license": index.license or "",
        "architecture": index.architecture or "",
        "adapter of": index.base or "",
        "kind": index.kind,
        "quantized": _quantization(index.quantization) if index.quantization else "",
        "size": f"{format_size(index.size_bytes)} ({index.size_bytes} bytes)",
        "tensors": f"{len(index.tensors)}"
        + (f" and {len(index.aliases)} tied" if index.aliases else ""),
        "chunks": f"{len(index.chunks)} of {format_size(index.chunk_bytes)}",
        "side files": ", ".join(file.name for file in index.side_files),
    }
    width = max(map(len, facts))
    for name, value in facts.items():
        if value:
            print(f"{name:<{width}}  {value}")


def _quantization(done: Quantization) -> str:
    group = f"{done.group_size} weights" if done.group_size else "row"
    return f"{done.scheme}, a scale for each {group}, by {done.library}, error {done.error:.4g}"


def _print_layers(index: Index, *, tensors: bool) -> None:
    from rich.console import Console
    from rich.tree import Tree

    from serverlessllm.checkpoint.index import layers
    from serverlessllm.core.units import format_count, format_size

    tree = Tree("layers, in execution order")
    for layer in layers(index):
        held = sum(tensor.size_bytes for tensor in layer.tensors)
        tensor_count = format_count(len(layer.tensors), "tensor")
        branch = tree.add(
            f"{layer.name}  [dim]{format_size(held)}, {tensor_count}, "
            f"{_dtypes(layer.tensors)}, at {layer.offset}[/dim]"
        )
        if tensors:
            for tensor in layer.tensors:
                shape = "x".join(map(str, tensor.shape)) or "scalar"
                branch.add(
                    f"{tensor.name}  [dim]{tensor.dtype} {shape}, "
                    f"{format_size(tensor.size_bytes)} at {tensor.offset}[/dim]"
                )
    print()
    Console(highlight=False, soft_wrap=True).print(tree)
    for name, target in sorted(index.aliases.items()):
        print(f"tied: {name} → {target}")


def _dtypes(tensors: tuple[Tensor, ...]) -> str:
    return "+".join(sorted({tensor.dtype for tensor in tensors}))


def _print_digests(index: Index) -> None:
    from serverlessllm.cli.output import print_table

    print()
    print_table(
        ("#chunk", "#offset", "#bytes", "crc32c", "blake3"),
        (
            (str(n), *map(str, index.chunk_range(n)), f"{chunk.crc32c:08x}", chunk.blake3)
            for n, chunk in enumerate(index.chunks)
        ),
    )
