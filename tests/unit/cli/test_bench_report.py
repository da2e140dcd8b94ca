"""What bench/load.py makes of its figures."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import msgspec
import pytest
from bench import report
from bench.ready import Ready
from bench.report import Results, Row, Sample, plot, print_results, write_docs

from serverlessllm.core.ids import CheckpointId
from serverlessllm.core.units import GIB
from serverlessllm.loader.trial.dram import MAP_STAGE
from serverlessllm.loader.trial.report import Report, Stage


def sample(seconds: float, total: int = 7) -> Sample:
    return Sample(seconds=seconds, cpu_s=0.5, size_bytes=GIB, tensors=1, sum=total)


def trial(hop: str, *stages: tuple[str, float]) -> Report:
    seconds = sum(one for _, one in stages)
    return Report(
        checkpoint=CheckpointId("0" * 64),
        size_bytes=GIB,
        hop=hop,
        rounds=3,
        seconds=seconds,
        bytes_s=GIB / seconds,
        limit="memcpy",
        limit_bytes_s=1e10,
        share=0.5,
        stages=tuple(Stage(name=name, seconds=one) for name, one in stages),
        verify_share=0.02,
        cpu_s_per_gib=0.3,
        cached_share=0.0,
        copied_bytes=0,
    )


def results(*rows: Row) -> Results:
    return Results(
        size_bytes=GIB,
        rounds=3,
        limit_bytes_s=GIB / 0.9,
        limit="fio, psync",
        rows=list(rows),
        nvme=trial("nvme→dram", ("read", 0.9), ("verify", 0.1)),
        handover=trial("dram→process", ("find", 0.001), (MAP_STAGE, 0.002), ("read", 0.1)),
        ready=Ready(forked_s=[0.2], executed_s=[2.0], from_pretrained_s=[4.0], size_bytes=GIB),
    )


OURS = Row.of("ServerlessLLM, nvme → DRAM", "cold", [sample(9), sample(1), sample(2)], ours=True)
THEIRS = Row.of("safetensors load_file", "cold", [sample(4), sample(4)], ours=False)
WARM = Row.of("safetensors load_file, warm", "warm", [sample(0.1)], ours=False)
FAILED = Row.of("InstantTensor", "cold", [Sample(error="needs <CUDA>")], ours=False)


def test_a_row_is_of_medians():
    assert OURS.seconds == 2
    assert OURS.bytes_s == GIB / 2
    assert OURS.cpu_s_per_gib == 0.5


def test_who_read_other_weights_is_found():
    other = Row.of("other", "cold", [sample(1, total=8)], ours=False)
    with pytest.raises(ValueError, match="same weights"):
        results(OURS, other)


def test_the_table_and_the_bounds(capsys):
    print_results(results(WARM, THEIRS, FAILED, OURS))
    shown = capsys.readouterr().out
    order = [
        "**ServerlessLLM, nvme",
        "| safetensors load_file |",
        "| safetensors load_file, warm |",
        "needs <CUDA>",
    ]
    assert sorted(order, key=shown.index) == order
    assert "| safetensors load_file | cold | 0.22 | 2.00 |" in shown
    assert "| nvme → DRAM, verified ÷ fio | 0.45 | ≥ 0.9 | **missed** |" in shown
    assert "the best peer (safetensors load_file) | 2.00 | ≥ 1 | holds |" in shown
    assert "this disk allows 4.44 at most" in shown
    assert "| verification, part of a cold load | 0.02 | ≤ 0.05 | holds |" in shown
    assert "| DRAM → a second process, ms | 3.00 | ≤ 10 | holds |" in shown
    assert "| bytes copied by it | 0.00 | ≤ 0 | holds |" in shown
    assert "4.00 s, 20 times as long" in shown


def test_the_plot_is_a_picture_of_the_cold_rows():
    root = ET.fromstring(plot(results(WARM, THEIRS, FAILED, OURS)))
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "safetensors load_file" in texts
    assert "safetensors load_file, warm" not in texts
    assert "InstantTensor" not in texts


def test_the_section_is_written_between_its_marks(tmp_path, monkeypatch):
    page = tmp_path / "benchmarks.md"
    page.write_text("before\n<!-- load:begin -->\nold\n<!-- load:end -->\nafter\n")
    monkeypatch.setattr(report, "PAGE", page)
    monkeypatch.setattr(report, "PLOT", tmp_path / "benchmarks" / "load.svg")
    for _ in range(2):
        write_docs(results(OURS, THEIRS))
    text = page.read_text()
    assert text.startswith("before\n<!-- load:begin -->\n1.0 GiB, median of 3")
    assert text.endswith("<!-- load:end -->\nafter\n")
    assert text.count("benchmarks/load.svg") == 1
    assert (tmp_path / "benchmarks" / "load.svg").read_text().startswith("<svg")


def test_a_page_without_marks_is_left_alone(tmp_path, monkeypatch):
    (tmp_path / "page.md").write_text("no marks")
    monkeypatch.setattr(report, "PAGE", tmp_path / "page.md")
    with pytest.raises(ValueError, match="no marks"):
        write_docs(results(OURS, THEIRS))
    assert (tmp_path / "page.md").read_text() == "no marks"


def test_results_are_json():
    found = results(OURS, FAILED)
    assert msgspec.json.decode(msgspec.json.encode(found), type=Results) == found
