"""The documents walk the tree: what is in one is in the other."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from serverlessllm.config import example, schema
from serverlessllm.config.load import load
from serverlessllm.config.settings import Settings

ROOT = Path(__file__).parents[3]
SOURCE = ROOT / "src" / "serverlessllm"


def test_architecture_names_every_package():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    packages = [path.parent.name for path in SOURCE.glob("*/__init__.py")]
    modules = [path.name for path in SOURCE.glob("*.py") if path.name != "__init__.py"]
    missing = [name for name in packages if f"`{name}/`" not in text]
    missing += [name for name in modules if f"`{name}`" not in text]
    assert not missing


def test_architecture_names_no_package_that_is_gone():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = re.findall(r"^\| `([a-z_]+)/` \|", text, re.MULTILINE)
    assert named
    assert [name for name in named if not (SOURCE / name).is_dir()] == []


def test_the_example_is_what_the_settings_say():
    kept = (ROOT / "serverlessllm.example.toml").read_text(encoding="utf-8")
    assert kept == example.render(), "run: sllm config example > serverlessllm.example.toml"


def test_the_example_is_valid_as_it_is_and_uncommented(tmp_path):
    text = (ROOT / "serverlessllm.example.toml").read_text(encoding="utf-8")
    plain = tmp_path / "plain.toml"
    plain.write_text(text)
    assert load(path=plain, environ={}).settings == Settings()

    keys = {field.name for field in schema.fields(Settings).values()}
    lines = [
        line[2:] if line.startswith("# ") and line[2:].partition(" = ")[0] in keys else line
        for line in text.splitlines()
    ]
    full = tmp_path / "full.toml"
    full.write_text("\n".join(lines))
    loaded = load(path=full, environ={})
    assert loaded.settings == Settings()
    assert set(loaded.origins) == set(schema.fields(Settings))


def test_every_setting_says_what_it_does():
    assert [key for key, field in schema.fields(Settings).items() if not field.doc] == []


def test_every_setting_that_is_a_number_of_something_has_its_unit():
    counts = re.compile(
        r"_(bytes|bytes_s|s|max|min|lines|factor|share|gain|tries|blocks|concurrency)"
        r"(_max|_min)?$"
    )
    bare = {"tries", "backlog", "delta", "cpus", "workers"}
    unnamed = [
        key
        for key, field in schema.fields(Settings).items()
        if isinstance(field.default, int | float)
        and not isinstance(field.default, bool)
        and not counts.search(field.name)
        and field.name not in bare
    ]
    assert [key for key in unnamed if not re.search(r"(threads|waiting|lines|retry)", key)] == []


def test_the_glossary_is_sorted_and_has_each_word_once():
    text = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    words = re.findall(r"^\| \*\*([^*]+)\*\* \|", text, re.MULTILINE)
    assert len(words) > 20
    assert words == sorted(set(words), key=str.lower)


@pytest.mark.parametrize(
    "page", ["README.md", *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md")))]
)
def test_links_between_documents_lead_somewhere(page):
    path = ROOT / page
    links = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8"))
    assert [link for link in links if not (path.parent / link).exists()] == []


def test_dependencies_are_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"]]
    wanted += itertools.chain.from_iterable(project["optional-dependencies"].values())
    pinned = {
        line.partition("==")[0].lower()
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if "==" in line
    }
    names = {re.split(r"[\[<>=!~; ]", text)[0].lower() for text in wanted} - {project["name"]}
    assert names - pinned == set()


def test_every_verb_of_the_readme_exists():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text += (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
    verbs = set(re.findall(r"\bsllm ([a-z]+)\b", text))
    shown = subprocess.run(
        [sys.executable, "-m", "serverlessllm.cli.main", "--help"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert {verb for verb in verbs if not re.search(rf"^  {verb} ", shown, re.MULTILINE)} == set()
