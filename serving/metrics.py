"""A service's metrics for Prometheus."""

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

from fastvar_trt.runtime.service import LATENCY_BUCKETS_S, Service


class ServiceCollector(Collector):
    """Reads `Service.metrics()` when Prometheus asks; register it with a `CollectorRegistry`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        """The metrics, names as Prometheus recommends: base units, `_total` for counts."""
        found = self._service.metrics()
        requests = CounterMetricFamily("fastvar_requests", "Requests by what became of them.", labels=["outcome"])
        for outcome in ("completed", "rejected", "cancelled", "failed"):
            requests.add_metric([outcome], getattr(found, outcome))
        yield requests
        yield CounterMetricFamily("fastvar_accepted_requests", "Requests that were queued.", value=found.accepted)
        yield GaugeMetricFamily("fastvar_queued_requests", "Requests that wait.", value=found.queued)
        yield GaugeMetricFamily("fastvar_running_requests", "Requests of the batch that runs.", value=found.running)
        bounds = [*map(str, LATENCY_BUCKETS_S), "+Inf"]
        yield HistogramMetricFamily(
            "fastvar_request_duration_seconds",
            "From submission to the picture.",
            buckets=list(zip(bounds, accumulate(found.latency_counts), strict=True)),
            sum_value=found.latency_sum_s,
        )
        batches = CounterMetricFamily("fastvar_batches", "Runs of the chain by pictures.", labels=["pictures"])
        for size, count in sorted(found.batch_sizes.items()):
            batches.add_metric([str(size)], count)
        yield batches
        manifest = self._service.pipeline.manifest
        variant = manifest.default
        yield InfoMetricFamily(
            "fastvar_bundle",
            "What is served.",
            value={
                "family": manifest.model.family,
                "plan": variant.plan.name,
                "precision": manifest.precision,
                "size": f"{variant.image_width}x{variant.image_height}",
                "backend": self._service.pipeline.backend.name,
            },
        )
