"""Servers: `http` and `ray_deployment` around `runtime.Service`, `triton` around `runtime.Pipeline`; `metrics`."""
