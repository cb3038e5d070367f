"""The exporter: official checkpoints in, bundles out. Needs torch and onnx (`pip install 'fastvar-trt[export]'`)."""
