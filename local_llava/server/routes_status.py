"""How the server stands: /health for people and supervisors, /metrics for Prometheus."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.responses import Response

from local_llava import __version__
from local_llava.server.backend import Backend
from local_llava.server.metrics import Metrics


class Standing(BaseModel):
    """How the server stands."""

    status: Literal["ok", "restarting", "failing", "stopping"]
    """"restarting" while a model's process is started again; "failing" when it keeps dying, with status 503;
    "stopping" when the server was asked to end, with status 503."""
    version: str
    loaded: list[str]
    """Models in memory."""
    answering: int
    """Answers being given, or waiting."""
    restarts: int
    """Times that a model's process died and was started again."""
    detail: str
    """What went wrong last."""


def router(backend: Backend, metrics: Metrics, stopping: Callable[[], bool]) -> APIRouter:
    """The routes.

    Args:
        backend: Whose health is told.
        metrics: What was counted.
        stopping: Whether the server was asked to end.
    """
    routes = APIRouter(tags=["Server"])

    @routes.get("/health", summary="How the server stands", responses={503: {"model": Standing}})
    async def health(response: Response) -> Standing:
        now = backend.health()
        status = "stopping" if stopping() else now.status
        response.status_code = 503 if status in ("stopping", "failing") else 200
        return Standing.model_validate(
            {
                "status": status,
                "version": __version__,
                "loaded": now.loaded,
                "answering": now.answering,
                "restarts": now.restarts,
                "detail": now.detail,
            }
        )

    @routes.get(
        "/metrics",
        summary="Numbers for Prometheus",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    async def read() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return routes
