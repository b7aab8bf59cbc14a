"""Serves the dashboard from a thread of this process. Imported by those who want it only.

DASH-1 (local): it listens on 127.0.0.1 unless told otherwise, answers GET alone, and changes nothing.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import socket
import threading
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from hpc_ray.dashboard.prometheus import render
from hpc_ray.exceptions import GetTimeoutError, RayError
from hpc_ray.observation import Asking, trace_events
from hpc_ray.util.state import RayStateApiException, StateApiClient

DEFAULT_PORT = 8265
_PORTS_TRIED = 100
_TIMEOUT_S = 10.0
_PAGE = Path(__file__).with_name("page.html")


def _page(request: Request) -> Response:
    return HTMLResponse(_PAGE.read_text(encoding="utf-8"))


def _list(request: Request) -> Response:
    query = request.query_params
    keys, values = query.getlist("filter_keys"), query.getlist("filter_values")
    filters = list(zip(keys, query.getlist("filter_predicates") or ["="] * len(keys), values, strict=True))
    detail = query.get("detail", "").lower() in ("1", "true")
    limit = int(query.get("limit", "100"))
    rows = StateApiClient().list(request.path_params["resource"], filters, limit, _TIMEOUT_S, detail, False)
    return _answer([dataclasses.asdict(row) for row in rows])


def _summary(request: Request) -> Response:
    return _answer(StateApiClient().summary(request.path_params["resource"], _TIMEOUT_S, False))


def _timeline(request: Request) -> Response:
    return Response(json.dumps(trace_events()), media_type="application/json")


def _metrics(request: Request) -> Response:
    return PlainTextResponse(render(Asking(timeout_s=_TIMEOUT_S)), media_type="text/plain; version=0.0.4")


def _answer(result: Any) -> Response:
    return JSONResponse({"result": True, "msg": "", "data": {"result": {"result": result}}})


async def _refused(request: Request, error: Exception) -> Response:
    return JSONResponse({"result": False, "msg": str(error), "data": {}}, status_code=400)


async def _unavailable(request: Request, error: Exception) -> Response:
    return JSONResponse({"result": False, "msg": str(error), "data": {}}, status_code=503)


def application() -> Starlette:
    """The web application; it asks the session of this process."""
    return Starlette(
        routes=[
            Route("/", _page),
            Route("/metrics", _metrics),
            Route("/timeline", _timeline),
            Route("/api/v0/{resource}/summarize", _summary),
            Route("/api/v0/{resource}", _list),
        ],
        exception_handlers={
            RayStateApiException: _refused,
            ValueError: _refused,
            GetTimeoutError: _unavailable,
            RayError: _unavailable,
        },
    )


class Dashboard:
    """Serves from now on.

    Args:
        host: 127.0.0.1 by default.
        port: by default the first free one from 8265 on.

    Raises:
        OSError: the port is taken, or none is free.
    """

    def __init__(self, host: str | None = None, port: int | None = None):
        self._socket = _listen(host or "127.0.0.1", port)
        config = uvicorn.Config(application(), log_config=None, log_level="error", access_log=False, lifespan="off", ws="none")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), name="hpc_ray-dashboard", daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        """host:port"""
        host, port = self._socket.getsockname()[:2]
        return f"{host}:{port}"

    def close(self) -> None:
        """Ends it. Blocks for the requests that are being answered, for 5 s at most."""
        self._server.should_exit = True
        self._thread.join(5.0)
        self._socket.close()


def _listen(host: str, port: int | None) -> socket.socket:
    if port is not None and not 0 <= port <= 65535:  # create_server would raise OverflowError, and leave its socket open
        raise OSError(f"the dashboard cannot listen on {host}:{port}: ports are numbers from 0 to 65535")
    ports = range(DEFAULT_PORT, DEFAULT_PORT + _PORTS_TRIED) if port is None else [port]
    for number in ports:
        try:
            return socket.create_server((host, number))
        except OSError as error:
            if error.errno != errno.EADDRINUSE or number == ports[-1]:
                raise OSError(f"the dashboard cannot listen on {host}:{number}: {error.strerror}") from error
    raise AssertionError("no port was tried")
