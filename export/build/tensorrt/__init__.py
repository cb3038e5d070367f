"""TensorRT engines of a bundle's graphs: TensorRT for RTX anywhere, enterprise TensorRT on the target's GPU."""
