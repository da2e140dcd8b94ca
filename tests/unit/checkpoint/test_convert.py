"""Conversion: the same bytes every time, from every interruption, and nothing left behind."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import numpy as np
import pytest
import safetensors

from serverlessllm.checkpoint.convert import ChunkDone, Converted, convert
from serverlessllm.checkpoint.index import checkpoint_id, decode_index
from serverlessllm.checkpoint.journal import finished_id
from serverlessllm.checkpoint.reader import verify
from serverlessllm.checkpoint.sources.base import (
    LocalFile,
    MemoryFile,
    RawCheckpoint,
    RawFile,
    open_file,
    open_folder,
)
from serverlessllm.core.errors import (
    CheckpointError,
    Conflict,
    CorruptChunk,
    OutOfSpace,
    SourceUnavailable,
    UnsupportedCheckpoint,
)
from serverlessllm.testing.checkpoints import (
    RawTensorData,
    raw_checkpoint,
    safetensors_bytes,
    write_random_gguf,
    write_random_safetensors,
)

CHUNK_BYTES = 32 * 1024
FINISHED = ["model.bin", "model.idx", "model.journal"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_random_safetensors(tmp_path / "raw", shards=3)


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def contents(converted: Converted) -> tuple[bytes, bytes]:
    return converted.idx_path.read_bytes(), converted.bin_path.read_bytes()


def test_the_same_input_gives_the_same_bytes_wherever_it_lies(tmp_path: Path) -> None:
    results = []
    for place in ("one", "two"):
        raw = write_random_safetensors(tmp_path / place / "raw", shards=2)
        out = tmp_path / place / "out"
        results.append(contents(convert(open_folder(raw, model="m"), out)))
        assert names(out) == FINISHED
        assert str(tmp_path).encode() not in results[-1][0]
    assert results[0] == results[1]


def test_the_grouping_into_shards_changes_no_byte_of_the_bin(tmp_path: Path) -> None:
    bins = []
    for shards in (1, 2, 5):
        raw = write_random_safetensors(tmp_path / f"raw{shards}", shards=shards)
        bins.append(convert(open_folder(raw, model="m"), tmp_path / f"{shards}").bin_path)
    assert len({path.read_bytes() for path in bins}) == 1


def test_what_is_converted_is_what_it_says(tmp_path: Path, folder: Path) -> None:
    converted = convert(open_folder(folder, model="org/m"), tmp_path / "out")
    idx = converted.idx_path.read_bytes()
    assert decode_index(idx) == converted.index
    assert checkpoint_id(idx) == converted.id
    assert converted.index.model == "org/m"
    assert converted.index.source == "file:raw"
    assert converted.index.architecture == "LlamaForCausalLM"
    data = converted.bin_path.read_bytes()
    assert len(data) == converted.size_bytes
    for side in converted.index.side_files:
        stored = data[side.offset : side.offset + side.size_bytes]
        assert stored == (folder / side.name).read_bytes()


def test_what_the_safetensors_library_wrote_passes_through(tmp_path: Path) -> None:
    dtypes = ("bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "uint8", "float64")
    sizes = (2, 1, 1, 1, 1, 8)
    weights = [np.frombuffer(os.urandom(35 * size), dtype=np.uint8) for size in sizes]
    specs = {
        f"model.layers.{n}.weight": safetensors.TensorSpec(
            dtype=dtype, shape=(5, 7), data_ptr=weight.ctypes.data, data_len=weight.nbytes
        )
        for n, (dtype, weight) in enumerate(zip(dtypes, weights, strict=True))
    }
    data: bytes = safetensors.serialize(specs, {"format": "pt"})
    converted = convert(raw_checkpoint({"model.safetensors": data}), tmp_path, chunk_bytes=4096)
    stored = converted.bin_path.read_bytes()
    theirs = dict(safetensors.deserialize(data))
    assert len(theirs) == len(converted.index.tensors) == len(dtypes)
    for tensor in converted.index.tensors:
        read = theirs[tensor.name]
        assert (tensor.dtype, list(tensor.shape)) == (read["dtype"], read["shape"])
        found = stored[tensor.offset : tensor.offset + tensor.size_bytes]
        assert found == bytes(read["data"]) == weights[int(tensor.name.split(".")[2])].tobytes()


def test_a_gguf_is_its_bin(tmp_path: Path) -> None:
    path = write_random_gguf(tmp_path / "m.gguf")
    converted = convert(open_file(path, model="m"), tmp_path / "out", chunk_bytes=CHUNK_BYTES)
    assert converted.bin_path.read_bytes() == path.read_bytes()
    assert converted.index.license == "apache-2.0"


def test_tells_of_every_chunk_in_order_when_its_bytes_are_there(
    tmp_path: Path, folder: Path
) -> None:
    seen: list[ChunkDone] = []
    parts: list[bytes] = []

    def on_chunk(chunk: ChunkDone) -> None:
        seen.append(chunk)
        with chunk.path.open("rb") as file:
            file.seek(chunk.offset)
            parts.append(file.read(chunk.size_bytes))

    out = tmp_path / "out"
    done = convert(open_folder(folder, model="m"), out, on_chunk=on_chunk, chunk_bytes=CHUNK_BYTES)
    assert [chunk.number for chunk in seen] == list(range(len(done.index.chunks)))
    assert {chunk.total_bytes for chunk in seen} == {done.size_bytes}
    assert b"".join(parts) == done.bin_path.read_bytes()


class Interrupted(Exception):
    pass


class CountingFile(LocalFile, frozen=True):
    """Counts the bytes that are read of it in `counts`."""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        counts.append(len(buffer))
        super().read_into(offset, buffer)


counts: list[int] = []


def counted(folder: Path) -> RawCheckpoint:
    raw = open_folder(folder, model="m")
    files: dict[str, RawFile] = {
        name: CountingFile.at(name, folder / name) if name.endswith(".safetensors") else file
        for name, file in raw.files.items()
    }
    return RawCheckpoint(files=files, model="m", source=raw.source, revision=raw.revision)


@pytest.mark.parametrize("stop_at", [0, 1, 3, 7])
def test_goes_on_where_it_stopped(tmp_path: Path, folder: Path, stop_at: int) -> None:
    expected = contents(
        convert(open_folder(folder, model="m"), tmp_path / "expected", chunk_bytes=CHUNK_BYTES)
    )
    out = tmp_path / "out"

    def stop(chunk: ChunkDone) -> None:
        if chunk.number == stop_at:
            raise Interrupted

    with pytest.raises(Interrupted):
        convert(counted(folder), out, on_chunk=stop, chunk_bytes=CHUNK_BYTES)
    assert names(out) == ["model.bin.partial", "model.journal"]
    counts.clear()
    seen: list[int] = []
    done = convert(
        counted(folder), out, on_chunk=lambda c: seen.append(c.number), chunk_bytes=CHUNK_BYTES
    )
    assert contents(done) == expected
    assert names(out) == FINISHED
    assert seen == list(range(len(done.index.chunks)))
    headers = 3 * 16 * 1024
    assert sum(counts) <= done.size_bytes - (stop_at + 1) * CHUNK_BYTES + headers


def interrupt(folder: Path, out: Path) -> None:
    def stop(chunk: ChunkDone) -> None:
        if chunk.number == 4:
            raise Interrupted

    with pytest.raises(Interrupted):
        convert(open_folder(folder, model="m"), out, on_chunk=stop, chunk_bytes=CHUNK_BYTES)


@pytest.mark.parametrize("damage", ["bin", "bin cut", "bin gone", "journal", "journal cut", "junk"])
def test_what_an_interruption_left_is_not_trusted(
    tmp_path: Path, folder: Path, damage: str
) -> None:
    expected = contents(
        convert(open_folder(folder, model="m"), tmp_path / "expected", chunk_bytes=CHUNK_BYTES)
    )
    out = tmp_path / "out"
    interrupt(folder, out)
    partial, journal = out / "model.bin.partial", out / "model.journal"
    match damage:
        case "bin":
            with partial.open("r+b") as file:
                file.seek(2 * CHUNK_BYTES + 5)
                file.write(b"\xff\x00\xff")
        case "bin cut":
            os.truncate(partial, CHUNK_BYTES + 1)
        case "bin gone":
            partial.unlink()
        case "journal":
            journal.write_bytes(journal.read_bytes().replace(b"a", b"b"))
        case "journal cut":
            os.truncate(journal, journal.stat().st_size - 7)
        case "junk":
            journal.write_bytes(b"\x00" * 1000)
    done = convert(open_folder(folder, model="m"), out, chunk_bytes=CHUNK_BYTES)
    assert contents(done) == expected
    assert names(out) == FINISHED


def test_a_changed_source_starts_anew(tmp_path: Path, folder: Path) -> None:
    out = tmp_path / "out"
    interrupt(folder, out)
    write_random_safetensors(folder, shards=3, seed=1)  # the same names, shapes and sizes
    done = convert(open_folder(folder, model="m"), out, chunk_bytes=CHUNK_BYTES)
    fresh = convert(open_folder(folder, model="m"), tmp_path / "fresh", chunk_bytes=CHUNK_BYTES)
    assert contents(done) == contents(fresh)


def test_another_conversion_replaces_a_finished_one(tmp_path: Path, folder: Path) -> None:
    out = tmp_path / "out"
    convert(open_folder(folder, model="m"), out)
    gguf = write_random_gguf(tmp_path / "m.gguf")
    done = convert(open_file(gguf, model="m"), out)
    assert done.bin_path.read_bytes() == gguf.read_bytes()
    verify(done.bin_path, decode_index(done.idx_path.read_bytes()))
    assert names(out) == FINISHED


def test_a_failure_leaves_the_finished_one_alone(tmp_path: Path, folder: Path) -> None:
    out = tmp_path / "out"
    before = contents(done := convert(open_folder(folder, model="m"), out))

    class Broken(MemoryFile, frozen=True):
        def read_into(self, offset: int, buffer: memoryview) -> None:
            if offset:
                raise SourceUnavailable("the line went dead")
            super().read_into(offset, buffer)

    gguf = write_random_gguf(tmp_path / "m.gguf").read_bytes()
    files: dict[str, RawFile] = {"m.gguf": Broken("m.gguf", gguf)}
    broken = RawCheckpoint(files=files, model="m", source="s", revision="r")
    for _ in range(2):
        with pytest.raises(SourceUnavailable):
            convert(broken, out, chunk_bytes=CHUNK_BYTES)
        assert contents(done) == before


def test_only_one_conversion_writes_to_a_folder(tmp_path: Path, folder: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    fd = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        with pytest.raises(Conflict):
            convert(open_folder(folder, model="m"), out)
    finally:
        os.close(fd)
    convert(open_folder(folder, model="m"), out)


def test_a_bad_source_leaves_no_folder(tmp_path: Path) -> None:
    for files in ({"model.safetensors": b"junk junk junk"}, {"m.gguf": b"GGUF"}):
        with pytest.raises(CheckpointError):
            convert(raw_checkpoint(files), tmp_path / "out")
    with pytest.raises(UnsupportedCheckpoint):
        convert(raw_checkpoint({"pytorch_model.bin": b"\x80\x02."}), tmp_path / "out")
    assert names(tmp_path) == []


def test_a_name_that_no_reader_accepts_is_never_written(tmp_path: Path, folder: Path) -> None:
    raw = open_folder(folder, model="m", source="file:a\nb")
    with pytest.raises(CheckpointError, match="do not print"):
        convert(raw, tmp_path / "out")
    assert not (tmp_path / "out" / "model.idx").exists()


def test_too_little_space_is_known_before_the_first_byte(tmp_path: Path) -> None:
    class Sparse(MemoryFile, frozen=True):
        @property
        def size_bytes(self) -> int:
            return 32 << 40

    gguf = write_random_gguf(tmp_path / "m.gguf").read_bytes()
    files: dict[str, RawFile] = {"m.gguf": Sparse("m.gguf", gguf)}
    raw = RawCheckpoint(files=files, model="m", source="s", revision="r")
    with pytest.raises(OutOfSpace, match=r"needs 32\.0 TiB.* free"):
        convert(raw, tmp_path / "out")
    assert names(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("number", "error"),
    [
        (errno.ENOSPC, OutOfSpace),
        (errno.EDQUOT, OutOfSpace),
        (errno.EIO, CheckpointError),
        (errno.EROFS, CheckpointError),
    ],
)
def test_a_disk_that_fails_is_an_error_of_the_tree(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, number: int, error: type
) -> None:
    def fail(fd: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(error, match=os.strerror(number)):
        convert(open_folder(folder, model="m"), tmp_path / "out")
    left = names(tmp_path / "out")
    assert left == ([] if error is OutOfSpace else ["model.bin.partial", "model.journal"])


def test_a_disk_that_keeps_other_bytes_is_found_out(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.pwrite

    def write_and_damage(fd: int, data: memoryview, offset: int) -> int:
        written = write(fd, data, offset)
        if offset == 2 * CHUNK_BYTES:
            write(fd, bytes(4096), offset + 4096)
        return written

    monkeypatch.setattr(os, "pwrite", write_and_damage)
    with pytest.raises(CorruptChunk, match=r"chunk 2 .* came back from the disk other"):
        convert(open_folder(folder, model="m"), tmp_path / "out", chunk_bytes=CHUNK_BYTES)
    assert names(tmp_path / "out") == []


def test_what_is_finished_is_verified_and_not_written_again(tmp_path: Path, folder: Path) -> None:
    out = tmp_path / "out"
    first = convert(counted(folder), out, chunk_bytes=CHUNK_BYTES)
    before = first.bin_path.stat()
    counts.clear()
    seen: list[ChunkDone] = []
    again = convert(counted(folder), out, on_chunk=seen.append, chunk_bytes=CHUNK_BYTES)
    assert again == first
    assert [chunk.number for chunk in seen] == list(range(len(first.index.chunks)))
    assert {chunk.path for chunk in seen} == {first.bin_path}
    assert sum(counts) < 3 * 16 * 1024  # the headers
    after = first.bin_path.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.parametrize("damage", ["bin", "bin cut", "bin gone", "idx", "idx gone", "journal"])
def test_what_is_finished_and_damaged_is_made_whole(
    tmp_path: Path, folder: Path, damage: str
) -> None:
    out = tmp_path / "out"
    expected = contents(done := convert(open_folder(folder, model="m"), out))
    match damage:
        case "bin":
            with done.bin_path.open("r+b") as file:
                file.seek(CHUNK_BYTES + 5)
                file.write(b"\xff\x00\xff")
        case "bin cut":
            os.truncate(done.bin_path, CHUNK_BYTES + 1)
        case "bin gone":
            done.bin_path.unlink()
        case "idx":
            done.idx_path.write_bytes(expected[0].replace(b"Llama", b"Lhama"))
        case "idx gone":
            done.idx_path.unlink()
        case "journal":
            (out / "model.journal").unlink()
    assert contents(convert(open_folder(folder, model="m"), out)) == expected
    assert names(out) == FINISHED


def test_another_name_is_another_checkpoint_of_the_same_bytes(tmp_path: Path, folder: Path) -> None:
    one = convert(open_folder(folder, model="one"), tmp_path / "out")
    two = convert(open_folder(folder, model="two"), tmp_path / "out")
    assert one.id != two.id
    assert decode_index(two.idx_path.read_bytes()).model == "two"
    assert two.index.chunks == one.index.chunks
    assert finished_id(tmp_path / "out" / "model.journal") == two.id


def test_a_file_system_without_direct_io_is_written_through(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = contents(convert(open_folder(folder, model="m"), tmp_path / "direct"))
    open_, fdatasync = os.open, os.fdatasync
    syncs: list[int] = []

    def refuse_direct(path: str, flags: int, *more: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return open_(path, flags, *more)

    def count_syncs(fd: int) -> None:
        syncs.append(fd)
        fdatasync(fd)

    monkeypatch.setattr(os, "open", refuse_direct)
    monkeypatch.setattr(os, "fdatasync", count_syncs)
    assert contents(convert(open_folder(folder, model="m"), tmp_path / "cached")) == expected
    assert syncs


def test_a_file_system_that_wants_more_than_pages_is_written_through(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = contents(convert(open_folder(folder, model="m"), tmp_path / "direct"))
    write = os.pwrite

    def refuse_direct(fd: int, data: memoryview, offset: int) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return write(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", refuse_direct)
    done = convert(open_folder(folder, model="m"), tmp_path / "cached", chunk_bytes=CHUNK_BYTES)
    assert done.bin_path.read_bytes() == expected[1]


def model_of_old() -> dict[str, bytes]:
    """Two shards without a map, a tied pair, every alignment, side files, a code reference."""
    sizes = {"lm_head.weight": 640, "model.embed_tokens.weight": 640, "model.norm.weight": 6}
    sizes |= {f"model.layers.{n}.mlp.up_proj.weight": 2 * n + 98 for n in (10, 9, 0)}
    tensors = {
        name: RawTensorData("BF16", (size // 2,), bytes(range(256)) * 2 + bytes(size - 512))
        if size > 512
        else RawTensorData("BF16", (size // 2,), bytes(range(size)))
        for name, size in sizes.items()
    }
    halves = (dict(list(tensors.items())[start::2]) for start in (0, 1))
    return {
        **{
            f"model-0000{number}-of-00002.safetensors": safetensors_bytes(half)
            for number, half in enumerate(halves, 1)
        },
        "config.json": b'{"architectures": ["Llama"], "auto_map": {"AutoModel": "m.M"}}',
        "tokenizer.json": b"{}",
        "README.md": b"not a side file",
    }


@pytest.mark.parametrize(
    ("chunk_bytes", "id_"),
    [
        (4096, "8a6ad767a470d231b34488f1692f4dd601f52436cc43cf36ed5de0074caed9f5"),
        (16 << 20, "4425a87bbbb0ec3b726caf7023784fe752c39f6cffafeacada29ee46097af66d"),
    ],
)
def test_ids_stay_what_they_were(tmp_path: Path, chunk_bytes: int, id_: str) -> None:
    """A checkpoint that was published is found by its id: a new version must not give another."""
    assert convert(raw_checkpoint(model_of_old()), tmp_path, chunk_bytes=chunk_bytes).id == id_
