"""The demo, as a newcomer meets it: what it prints can be pasted into a shell, and works."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from tests.e2e.system import run


def test_it_answers_three_times_and_ends(data_dir):
    done = run("demo", "--once", "--data-dir", str(data_dir), timeout_s=110)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("= to first token") == 3
    cold, warm, hot = done.stdout.split("> What is 2+2?")[1:]
    assert "fetch store→" in cold
    assert "store→" not in warm + hot


def test_what_it_says_to_do_next_works(data_dir):
    demo = subprocess.Popen(
        [sys.executable, "-m", "serverlessllm.cli.main", "demo", "--data-dir", str(data_dir)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    assert demo.stdout is not None
    try:
        shown = ""
        for line in demo.stdout:
            shown += line
            if line.startswith("Serving on "):
                break
        script = shown.partition("from another shell:")[2].partition("Serving on")[0]
        script = script[script.index(sys.executable) :]  # curl is not everywhere
        script = script.replace("run smollm2 ", "run smollm2 Hello ")
        done = subprocess.run(
            ["bash", "-eu", "-c", script], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        assert "MODEL" in done.stdout
        os.killpg(demo.pid, signal.SIGINT)  # as a terminal does
        assert demo.wait(30) == 0
    finally:
        demo.stdout.close()
        if demo.poll() is None:
            os.killpg(demo.pid, signal.SIGKILL)
            demo.wait()
