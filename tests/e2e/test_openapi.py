"""The served OpenAPI document and its page, by those who read them: schemathesis and a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WAIT_S = 100
CASES_MIN = 500
SHOWN = ("Continue a conversation", "Turn texts into vectors", "Management")


def browse(url: str, profile: Path) -> tuple[str, list[str], list[str]]:
    """The page as a browser has built it, what its console said, and what the page asked for."""
    browser = next(found for name in BROWSERS if (found := shutil.which(name)))
    log = profile / "net.json"
    done = subprocess.run(
        [
            browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--no-first-run", "--disable-background-networking", "--disable-component-update",
            "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
            "--enable-logging=stderr", "--virtual-time-budget=60000",
            f"--user-data-dir={profile}", f"--log-net-log={log}", "--dump-dom", url,
        ],
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=True,
    )  # fmt: skip
    console = [line for line in done.stderr.splitlines() if ":CONSOLE:" in line]
    params = [event.get("params", {}) for event in json.loads(log.read_text())["events"]]
    asked = [str(p["url"]) for p in params if "url" in p and "127.0.0.1" in p.get("initiator", "")]
    return done.stdout, console, asked


def test_the_page_shows_the_api_and_asks_nobody_else(server, tmp_path):
    page, console, asked = browse(f"{server.url}/docs", tmp_path)
    for text in SHOWN:
        assert text in page
    assert not [line for line in console if "INFO:CONSOLE" not in line or "rror" in line]
    assert f"{server.url}/openapi.json" in asked
    assert all(url.startswith(f"{server.url}/") for url in asked)


def test_answers_are_what_the_document_says():
    done = subprocess.run(
        [
            ROOT / "scripts" / "schemathesis.sh",
            *("--phases", "examples,fuzzing", "--max-examples", "15", "--generation-deterministic"),
        ],
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr
    counts = re.search(r"(\d+) generated, (\d+) passed", done.stdout)
    assert counts is not None
    assert int(counts[1]) == int(counts[2]) > CASES_MIN
