"""The page, written and read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from serverlessllm.testing.compatibility.asking import Behaviour, Client, Verdict, judge
from serverlessllm.testing.compatibility.chats import CHATS
from serverlessllm.testing.compatibility.engines import BACKENDS, engine
from serverlessllm.testing.compatibility.texts import COMPLETIONS, OTHERS
from serverlessllm.testing.contracts.backend import started

BEHAVIOURS: tuple[Behaviour, ...] = (*CHATS, *COMPLETIONS, *OTHERS)

Column = Mapping[tuple[str, str], Verdict]
"""A backend's verdicts, by group and name."""

_HEAD = """# Which parameter does what, on which backend

Written by `python -m serverlessllm.testing.compatibility`, which starts each backend on a tiny
model, asks it through the agent's code as a client would be answered, and looks whether the answer
shows the parameter's effect. A test holds this page to what it finds.

- **yes**: it has its effect.
- **refused**: 400, with the field's name or the operation's.
- **ignored**: the answer is as if the parameter were not there.
- **failed**: 502, the server's own failure.

`openai` is any server that you name; here it is llama.cpp's own, as somebody else might run it:
what it lacks is passed on as it is, and only its answers are made spec-complete. `llamacpp` is the
same engine with what we add to it. `fake` computes nothing, so what would change its answer has no
effect. A reranker is a model of its own: on llama.cpp `/v1/rerank` comes with the option
`rerank = "true"`. `suffix` needs a model whose vocabulary has marks for a gap.
"""


async def ask_all(backend: str, folder: Path) -> Column:
    """Start the backend and try every row."""
    async with started(engine(backend, folder), folder) as running:
        client = Client(running)
        return {(each.group, each.name): await judge(each, client) for each in BEHAVIOURS}


def render(columns: Sequence[Column]) -> str:
    """The page; the columns are in the order of `BACKENDS`."""
    lines = [_HEAD]
    group = ""
    for each in BEHAVIOURS:
        if each.group != group:
            group = each.group
            title = f"`{group}`" if group.startswith("/") else group
            names = " | ".join(f"`{name}`" for name in BACKENDS)
            lines += [f"\n## {title}\n", f"| | {names} |", "|---|" + "---|" * len(BACKENDS)]
        cells = " | ".join(str(column[group, each.name]) for column in columns)
        lines.append(f"| {each.name} | {cells} |")
    return "\n".join(lines) + "\n"


def read(page: str, backend: str) -> Column:
    """What the page says of a backend."""
    place = BACKENDS.index(backend)
    said: dict[tuple[str, str], Verdict] = {}
    group = ""
    for line in page.splitlines():
        if line.startswith("## "):
            group = line[3:].strip("`")
        elif line.startswith("| ") and not line.startswith("| |"):
            name, *cells = (cell.strip() for cell in line.strip("|").split(" | "))
            said[group, name] = Verdict(cells[place].strip("| "))
    return said
