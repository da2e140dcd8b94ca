"""ServerlessLLM: many models share few machines; the first request wakes one.

The tree is the architecture; `docs/architecture.md` walks it package by package.
"""

__version__ = "0.1.0"
