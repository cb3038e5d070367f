"""`fastvar serve`."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import click

from fastvar_trt.runtime.errors import RequestError
from fastvar_trt.runtime.manifest import read_manifest
from fastvar_trt.runtime.models import Models
from fastvar_trt.runtime.pipeline import Pipeline
from fastvar_trt.runtime.service import Service
from fastvar_trt.tools.cli.command import ErrorCommand, RuntimeOptions, examples, extras, runtime_options

_ANSWER_S = 5  # to send the last answers, after the requests have been drained
_BACKLOG = 2048  # connections that wait to be accepted
_LOG = logging.getLogger(__name__)


@click.command(
    cls=ErrorCommand,
    short_help="Serve bundles over HTTP.",
    epilog=examples(
        "fastvar serve out/demo_pruned",
        'curl -s --json \'{"prompt": "two blue cubes on snow"}\' localhost:8000/v1/images -o cubes.png',
        "fastvar serve out/infinity --backend tensorrt_rtx --host 0.0.0.0 --max-queue 256 --rate 60/minute",
        "fastvar serve small=out/demo_pruned large=out/infinity --max-memory 12 --api-key-file keys.txt",
    ),
)
@click.argument("bundles", nargs=-1, required=True, metavar="[NAME=]BUNDLE...")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 for all.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: a free one.")
@click.option("--max-queue", type=click.IntRange(1), default=64, show_default=True, help="Requests that may wait.")
@click.option(
    "--max-wait-ms",
    type=click.FloatRange(0),
    default=5.0,
    show_default=True,
    help="How long the first request of a batch waits for others.",
)
@click.option("--max-body", type=click.IntRange(1), default=16 << 20, show_default=True, help="Bytes of a request.")
@click.option(
    "--max-images",
    type=click.IntRange(1),
    default=10,
    show_default=True,
    help="Pictures of one request of OpenAI's API (`n`).",
)
@click.option(
    "--max-memory",
    type=click.FloatRange(0, min_open=True),
    help="GiB that loaded bundles may need together, by their manifests: others are unloaded. Default: no limit.",
)
@click.option(
    "--api-key-file",
    type=click.Path(path_type=Path),
    help="A key a line, one of which requests must bring (Authorization: Bearer KEY). Default: anybody may draw.",
)
@click.option("--rate", help="Requests for pictures per client address: 60/minute, 2/second, ...  Default: no limit.")
@click.option(
    "--deadline",
    type=click.FloatRange(0, min_open=True),
    default=120.0,
    show_default=True,
    help="Seconds that a request may take; those that ask for less get less.",
)
@click.option(
    "--drain",
    type=click.FloatRange(0),
    default=30.0,
    show_default=True,
    help="Seconds that running requests get when the server is told to stop.",
)
@runtime_options
def serve(
    bundles: tuple[str, ...],
    host: str,
    port: int,
    max_queue: int,
    max_wait_ms: float,
    max_body: int,
    max_images: int,
    max_memory: float | None,
    api_key_file: Path | None,
    rate: str | None,
    deadline: float,
    drain: float,
    runtime: RuntimeOptions,
) -> None:
    """Serve bundles over HTTP: pictures, edits, previews, OpenAI's images API, health, metrics, and a page to try it.

    The first bundle is loaded at once, others when they are first asked for by name. SIGTERM and SIGINT let running
    requests end. SIGHUP loads the bundles again, and serves the new ones from the next batch on; where one cannot be
    loaded, the old one stays.
    """
    with extras("serve"):
        import uvicorn

        from fastvar_trt.serving.http.app import ServerOptions, create_app
        from fastvar_trt.serving.http.keys import ApiKeys
        from fastvar_trt.serving.http.server import DrainingServer, parse_rate
    named = _named(bundles)
    limit = None if rate is None else parse_rate(rate)
    keys = None if api_key_file is None else ApiKeys.from_file(api_key_file)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s:     %(message)s")

    def load(bundle: Path) -> Pipeline:
        pipe = runtime.load(bundle)
        try:
            pipe.warm_up()
        except BaseException:
            pipe.close()
            raise
        return pipe

    def start(bundle: Path) -> Service:
        return Service(load(bundle), max_queue=max_queue, max_wait_s=max_wait_ms / 1e3)

    if hasattr(signal, "SIGHUP"):  # it would end the process while the bundle is loaded
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with _listen(host, port) as listening:  # before the bundle is loaded, which takes a while
        models = Models(
            {name: functools.partial(start, bundle) for name, bundle in named.items()},
            {name: functools.partial(read_manifest, bundle) for name, bundle in named.items()},
            None if max_memory is None else int(max_memory * 2**30),
            deadline,
        )
        with models.using():
            pass  # the first is there from the beginning
        options = ServerOptions(
            max_body_bytes=max_body, max_deadline_s=deadline, rate=limit, keys=keys, max_images=max_images
        )

        def on_start() -> None:
            reload_on_hangup(models, {name: functools.partial(load, bundle) for name, bundle in named.items()})
            shown = f"[{host}]" if ":" in host else host
            served = ", ".join(map(str, named.values()))
            _LOG.info("serving %s on http://%s:%d", served, shown, listening.getsockname()[1])

        app = create_app(models, options, on_start=on_start)
        config = uvicorn.Config(app, access_log=False, timeout_graceful_shutdown=int(drain) + _ANSWER_S)
        with contextlib.suppress(KeyboardInterrupt):  # which uvicorn raises again after it has ended well
            DrainingServer(config, models, drain).run(sockets=[listening])


def _named(bundles: tuple[str, ...]) -> dict[str, Path]:
    """`NAME=PATH` or `PATH`, whose name is the folder's."""
    found: dict[str, Path] = {}
    for text in bundles:
        name, _, path = text.partition("=") if "=" in text and not Path(text).exists() else ("", "", text)
        key = name or Path(os.path.abspath(path)).name  # noqa: PTH100  # resolve() would follow links
        if key in found:
            raise click.UsageError(f"two bundles are called {key}; name them as in NAME=PATH")
        found[key] = Path(path)
    return found


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise RequestError(
            f"--host {host} --port {port}: cannot listen there: {error.strerror or error}; give others"
        ) from error


def reload_on_hangup(models: Models, load: Mapping[str, Callable[[], Pipeline]]) -> None:
    """On SIGHUP, serve what `load` gives in place of what is loaded; called in the event loop's thread. Systems without
    the signal do without."""
    if not hasattr(signal, "SIGHUP"):
        return
    turns = threading.Lock()

    def reload() -> None:
        with turns:
            for name, service in models.loaded.items():
                replace(name, service)

    def replace(name: str, service: Service) -> None:
        try:
            pipe = load[name]()
        except Exception:
            _LOG.exception("the bundle cannot be loaded again; the old one stays")
            return
        try:
            service.replace(pipe).close()
        except RequestError:
            pipe.close()
            return
        manifest = pipe.manifest
        _LOG.info("the bundle was loaded again: plan %s, %s", manifest.default.plan.name, manifest.precision)

    asyncio.get_running_loop().add_signal_handler(
        signal.SIGHUP, lambda: threading.Thread(target=reload, name="fastvar-reload", daemon=True).start()
    )
