"""What a route is, for those that are not hot."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import msgspec

from serverlessllm.core.apikeys import Scope
from serverlessllm.core.errors import SLLMError
from serverlessllm.edge.server import Request

GET = ("GET", "HEAD")
POST = ("POST",)


class Route(msgspec.Struct, frozen=True, kw_only=True):
    """One path, or (its last character is `/`) everything below it."""

    path: str
    methods: tuple[str, ...]
    serve: Callable[[Request], Awaitable[None]]
    scope: Scope | None = Scope.INFERENCE
    """What a key must have; None: no key is asked for."""
    page: bool = False
    """Whether a browser may be asked for the key: as the password of HTTP's basic scheme."""
    explain: Callable[[Request, SLLMError], None] | None = None
    """Answers with an error in the words of another API; None: by the error contract."""


class RouteTable:
    """Finds a route by its path: the whole path first, then the longest prefix."""

    def __init__(self, routes: tuple[Route, ...]) -> None:
        self.routes = routes
        self._whole = {route.path: route for route in routes if not route.path.endswith("/")}
        below = [route for route in routes if route.path.endswith("/")]
        self._below = sorted(below, key=lambda route: -len(route.path))

    def find(self, path: str) -> Route | None:
        """None: there is no such route."""
        route = self._whole.get(path)
        if route is not None:
            return route
        return next((route for route in self._below if path.startswith(route.path)), None)
