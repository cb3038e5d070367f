"""The metrics of services for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from fastvar_trt.runtime.models import Models
from fastvar_trt.runtime.service import LATENCY_BUCKETS_S, Service


class ServiceCollector(Collector):
    """Reads `Service.metrics()` of the loaded models when Prometheus asks; register it with a `CollectorRegistry`."""

    def __init__(self, models: Models) -> None:
        self._models = models

    def collect(self) -> Iterator[Metric]:
        """The metrics, names as Prometheus recommends: base units, `_total` for counts."""
        requests = CounterMetricFamily(
            "fastvar_requests", "Requests by what became of them.", labels=["model", "outcome"]
        )
        accepted = CounterMetricFamily("fastvar_accepted_requests", "Requests that were queued.", labels=["model"])
        queued = GaugeMetricFamily("fastvar_queued_requests", "Requests that wait.", labels=["model"])
        running = GaugeMetricFamily("fastvar_running_requests", "Requests of the batch that runs.", labels=["model"])
        durations = HistogramMetricFamily(
            "fastvar_request_duration_seconds", "From submission to the picture.", labels=["model"]
        )
        batches = CounterMetricFamily("fastvar_batches", "Runs of the chain by pictures.", labels=["model", "pictures"])
        bundles = InfoMetricFamily("fastvar_bundle", "What is served.", labels=["model"])
        bounds = [*map(str, LATENCY_BUCKETS_S), "+Inf"]
        for name, service in self._models.loaded.items():
            found = service.metrics()
            for outcome in ("completed", "rejected", "cancelled", "failed"):
                requests.add_metric([name, outcome], getattr(found, outcome))
            accepted.add_metric([name], found.accepted)
            queued.add_metric([name], found.queued)
            running.add_metric([name], found.running)
            counts = list(zip(bounds, accumulate(found.latency_counts), strict=True))
            durations.add_metric([name], counts, found.latency_sum_s)
            for size, count in sorted(found.batch_sizes.items()):
                batches.add_metric([name, str(size)], count)
            bundles.add_metric([name], _bundle(service))
        yield from (requests, accepted, queued, running, durations, batches, bundles)


def _bundle(service: Service) -> dict[str, str]:
    manifest = service.pipeline.manifest
    return {
        "family": manifest.model.family,
        "plan": manifest.default.plan.name,
        "precision": manifest.precision,
        "size": manifest.default.size,
        "backend": service.pipeline.backend.name,
    }
