"""The HTTP server as a Ray Serve deployment: replicas on one machine or many, started again where they die.

```
serve run fastvar_trt.serving.ray_deployment:app bundle=/models/demo num_replicas=2
```
The bundle must lie at the same path on every machine. A replica that draws on a GPU asks for it with `num_gpus=1`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application

from fastvar_trt.runtime.errors import BackendError, RequestError
from fastvar_trt.runtime.pipeline import Pipeline
from fastvar_trt.runtime.service import Service
from fastvar_trt.serving.http.app import ServerOptions, create_app
from fastvar_trt.serving.http.server import parse_rate

_INGRESS_QUEUE = 16  # requests beyond the service's own queue that a replica takes, to refuse them itself


class FastVARReplica:
    """One replica: a bundle, its service and the application of `fastvar serve`."""

    def __init__(self, bundle: str, load: Mapping[str, Any], max_queue: int, max_wait_s: float, rate: str) -> None:
        pipe = Pipeline.load(bundle, **load)
        pipe.warm_up()
        self._service = Service(pipe, max_queue=max_queue, max_wait_s=max_wait_s)
        self._options = ServerOptions(rate=parse_rate(rate) if rate else None)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """For Ray Serve, which runs it in the replica."""
        return create_app(self._service, self._options)

    def check_health(self) -> None:
        """For Ray Serve, which replaces a replica that raises here."""
        if not self._service.healthy:
            raise BackendError("the service takes no requests any more")


def app(arguments: Mapping[str, Any]) -> Application:
    """What `serve run` and `serve.run` take.

    Args:
        arguments: `bundle`; of `Pipeline.load`: backend, device, num_threads, engines; of `Service`: max_queue,
            max_wait_s; `rate` as in `fastvar serve`, per replica; of the deployment: num_replicas, num_cpus, num_gpus.
            Values may be strings, as the command line gives them.

    Raises:
        RequestError: no bundle, or an argument that does not exist.
    """
    given = dict(arguments)
    if "bundle" not in given:
        raise RequestError("bundle: is missing; give bundle=PATH")
    bundle = str(Path(given.pop("bundle")).resolve())  # replicas have working folders of their own
    load: dict[str, Any] = {key: str(given.pop(key)) for key in ("backend", "device", "engines") if key in given}
    if "num_threads" in given:
        load["num_threads"] = _number("num_threads", given.pop("num_threads"), int)
    max_queue = _number("max_queue", given.pop("max_queue", 64), int)
    max_wait_s = _number("max_wait_s", given.pop("max_wait_s", 0.005), float)
    rate = str(given.pop("rate", ""))
    if rate:
        parse_rate(rate)
    num_replicas = _number("num_replicas", given.pop("num_replicas", 1), int)
    actor = {key: _number(key, given.pop(key), float) for key in ("num_cpus", "num_gpus") if key in given}
    if given:
        raise RequestError(f"{', '.join(given)}: no such argument")
    deploy = serve.deployment(
        name="fastvar",
        num_replicas=num_replicas,
        max_ongoing_requests=max_queue + _INGRESS_QUEUE,
        ray_actor_options=actor,
        health_check_period_s=5,
        graceful_shutdown_timeout_s=30,
    )
    return deploy(serve.ingress()(FastVARReplica)).bind(bundle, load, max_queue, max_wait_s, rate)


def _number(name: str, value: Any, kind: type[int] | type[float]) -> Any:
    try:
        return kind(value)
    except (TypeError, ValueError) as error:
        raise RequestError(f"{name}: got {value!r}, expected a number") from error
