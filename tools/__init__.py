"""Commands around a bundle: generate, inspect, verify, build."""
