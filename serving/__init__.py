"""Servers around `runtime.Service`: HTTP (`app`), Ray Serve (`ray_deployment`), Triton (`triton`)."""
