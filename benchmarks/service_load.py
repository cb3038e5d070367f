"""A service at saturation: requests per second and latency with and without dynamic batching, and memory over a soak.

Clients submit as fast as they are answered, in turns to a service that may batch and to one that may not, over the same
pipeline; both services live from the first round to the last. Prints a table and a JSON line.

    python benchmarks/service_load.py out/demo --requests 500 --clients 8
"""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import click
import numpy as np

from fastvar_trt.runtime import ImageRequest, Pipeline, Service
from fastvar_trt.tools.tables import format_table


def rss_mib() -> float:
    """Resident memory of this process."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


class _WithoutBatches:
    """The pipeline, as if its bundle held batch size 1 only."""

    def __init__(self, pipe: Pipeline) -> None:
        self._pipe = pipe

    @property
    def manifest(self) -> Any:
        """With one batch size."""
        return dataclasses.replace(self._pipe.manifest, batches=(1,))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipe, name)


def load(service: Service, requests: int, clients: int, num_classes: int) -> dict[str, Any]:
    """Ask for that many pictures, and wait for the last."""
    latencies: list[float] = []
    batches: Counter[int] = Counter()
    numbers = iter(range(requests))
    lock = threading.Lock()

    def client() -> None:
        while True:
            with lock:
                i = next(numbers, None)
            if i is None:
                return
            result = service.submit(ImageRequest(label=i % num_classes, seed=i)).result(600)
            with lock:
                latencies.append(result.total_ms)
                batches[result.batch] += 1

    begin = time.perf_counter()
    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - begin
    p50, p99 = np.percentile(latencies, [50, 99])
    return {
        "requests_per_s": round(requests / seconds, 2),
        "p50_ms": round(float(p50), 1),
        "p99_ms": round(float(p99), 1),
        "batches": dict(sorted(batches.items())),
    }


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--requests", default=500, show_default=True, help="In all, half to each service.")
@click.option("--clients", default=8, show_default=True)
@click.option("--rounds", default=5, show_default=True, help="Turns that the two services take.")
def main(bundle: Path, requests: int, clients: int, rounds: int) -> None:
    """Measure."""
    with Pipeline.load(bundle) as pipe:
        classes = pipe.manifest.model.num_classes
        if classes == 0 or max(pipe.manifest.batches) == 1:
            raise click.UsageError("give a bundle of classes with more than one batch size (--batch 1,4)")
        pipe.warm_up()
        alone: Any = _WithoutBatches(pipe)
        with Service(alone) as one_by_one, Service(pipe) as batching:
            services = {"one by one": one_by_one, "dynamic batches": batching}
            for service in services.values():
                load(service, 2 * clients, clients, classes)
            memory = [rss_mib()]
            found: dict[str, list[dict[str, Any]]] = {name: [] for name in services}
            for _ in range(rounds):
                for name, service in services.items():
                    found[name].append(load(service, requests // (2 * rounds), clients, classes))
                memory.append(rss_mib())
    medians = {
        name: {key: float(np.median([r[key] for r in runs])) for key in ("requests_per_s", "p50_ms", "p99_ms")}
        for name, runs in found.items()
    }
    rows: list[list[object]] = [
        [name, *(f"{m[key]:.1f}" for key in ("requests_per_s", "p50_ms", "p99_ms")), found[name][-1]["batches"]]
        for name, m in medians.items()
    ]
    click.echo(format_table(["service", "requests/s", "p50 ms", "p99 ms", "batch sizes, last round"], rows))
    ratio = medians["dynamic batches"]["requests_per_s"] / medians["one by one"]["requests_per_s"]
    click.echo(f"batches: {ratio:.2f}x the requests per second")
    click.echo("RSS after the warm-up and every round, MiB: " + ", ".join(f"{m:.1f}" for m in memory))
    click.echo(json.dumps({"services": medians, "speedup": round(ratio, 3), "rss_mib": [round(m, 1) for m in memory]}))


if __name__ == "__main__":
    main()
