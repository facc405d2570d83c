"""What the server counts, for Prometheus.

Knows what an answer costs (`Reply.timings`) and when its pieces come; counts requests by route, never by what they say.
Each `Metrics` has a registry of its own, so that several servers may live in one process.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from local_llava.errors import LocalLlavaError
from local_llava.server.backend import Backend, Health, Job, ModelInfo
from local_llava.server.errors import failure
from local_llava.types import Chunk, Reply

_FIRST_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160)
_WHOLE_S = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)
_METHODS = ("GET", "HEAD", "POST", "DELETE", "OPTIONS", "PUT", "PATCH")
_OTHER = "other"
"""The route of requests that no route takes, and that strangers could make any number of."""


# It would be a second line for each number, with the time of its first.
disable_created_metrics()  # type: ignore[no-untyped-call]


class Metrics:
    """The numbers of one server."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"local_llava_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"local_llava_{name}", text, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"local_llava_{name}", text, ("model",), buckets=buckets, registry=registry)

        self.requests = counter("requests", "HTTP requests", "api", "route", "method", "status")
        self.answers = counter("answers", "Answers by how they ended", "model", "end")
        self.prompt = counter("prompt_tokens", "Tokens of prompts, pictures included", "model")
        self.reused = counter("reused_tokens", "Those of them that were not evaluated again", "model")
        self.restored = counter("restored_tokens", "Those of the reused ones that came from disk", "model")
        self.completion = counter("completion_tokens", "Tokens of answers", "model")
        self.encoded = counter("images_encoded", "Pictures that went through the tower", "model")
        self.known = counter("images_reused", "Pictures in prompts that did not have to", "model")
        self.hits = counter("cache_hits", "Answers whose prompt was known in part, by where", "model", "where")
        self.waiting = gauge("answers_waiting", "Answers of which nothing has come yet: waiting, or reading the prompt")
        self.writing = gauge("answers_writing", "Answers that are being written")
        self.queue = histogram("queue_seconds", "From a question until its turn came", _FIRST_S)
        self.first = histogram("time_to_first_token_seconds", "From a question to the first piece of answer", _FIRST_S)
        self.whole = histogram("answer_seconds", "From a question to the end of its answer", _WHOLE_S)

    def watch(self, backend: Backend) -> None:
        """Also show how a backend stands, whenever the metrics are read."""
        self._registry.register(_Standing(backend))

    def observe(self, model: str, job: Job, reply: Reply) -> None:
        """Count an answer that is complete."""
        t = reply.timings
        self.prompt.labels(model).inc(t.prompt_tokens)
        self.reused.labels(model).inc(t.reused_tokens)
        self.restored.labels(model).inc(t.restored_tokens)
        self.completion.labels(model).inc(t.completion_tokens)
        self.encoded.labels(model).inc(t.images_encoded)
        n_images = sum(len(message.images) for message in job.messages)
        self.known.labels(model).inc(max(0, n_images - t.images_encoded))
        if t.restored_tokens:
            self.hits.labels(model, "disk").inc()
        elif t.reused_tokens:
            self.hits.labels(model, "memory").inc()
        self.queue.labels(model).observe(t.waited_s)

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self._registry)


class Measured:
    """A backend whose answers are counted."""

    def __init__(self, backend: Backend, metrics: Metrics) -> None:
        self._backend, self._metrics = backend, metrics

    def models(self) -> list[ModelInfo]:
        return self._backend.models()

    def info(self, name: str | None) -> ModelInfo:
        return self._backend.info(name)

    async def load(self, name: str | None, *, keep_alive_s: float | None = None) -> None:
        await self._backend.load(name, keep_alive_s=keep_alive_s)

    def health(self) -> Health:
        return self._backend.health()

    async def stream(
        self, name: str | None, job: Job, *, keep_alive_s: float | None = None
    ) -> AsyncGenerator[Chunk, None]:
        metrics, started = self._metrics, time.perf_counter()
        model = name or (await asyncio.to_thread(self._backend.info, None)).name  # it may read files
        end, now = "cancelled", metrics.waiting
        now.inc()
        try:
            async with aclosing(self._backend.stream(name, job, keep_alive_s=keep_alive_s)) as chunks:
                async for chunk in chunks:
                    if now is metrics.waiting:
                        now.dec()
                        now = metrics.writing
                        now.inc()
                        metrics.first.labels(model).observe(time.perf_counter() - started)
                    if chunk.reply is not None:
                        end = chunk.reply.finish_reason
                        metrics.observe(model, job, chunk.reply)
                        metrics.whole.labels(model).observe(time.perf_counter() - started)
                    yield chunk
        except (asyncio.CancelledError, GeneratorExit):
            raise
        except Exception as e:
            end = failure(e).code or ("refused" if isinstance(e, LocalLlavaError) else "defect")
            raise
        finally:
            now.dec()
            metrics.answers.labels(model, end).inc()


class Counted:
    """ASGI middleware that counts requests."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = "none"

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        try:
            await self._app(scope, receive, sent)
        finally:
            route = _route(scope)
            method = scope["method"] if scope["method"] in _METHODS else _OTHER
            self._metrics.requests.labels(_api(route), route, method, status).inc()


class _Standing(Collector):
    """What `Backend.health` says."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def collect(self) -> Iterator[Metric]:
        health = self._backend.health()
        yield GaugeMetricFamily(
            "local_llava_up", "1, or 0 while a model's process cannot be kept alive", health.status != "failing"
        )
        yield GaugeMetricFamily("local_llava_models_loaded", "Models in memory", len(health.loaded))
        yield GaugeMetricFamily("local_llava_answers_open", "Answers being given, or waiting", health.answering)
        yield CounterMetricFamily(
            "local_llava_restarts", "Times that a model's process was started again", health.restarts
        )


def _route(scope: Scope) -> str:
    """The path of the route that took a request, with its parameters unnamed."""
    path = getattr(scope.get("route"), "path", None)
    return path if isinstance(path, str) and path else _OTHER


def _api(route: str) -> str:
    return {"/api": "ollama", "/v1": "openai"}.get(route[: route.find("/", 1)], "server")
