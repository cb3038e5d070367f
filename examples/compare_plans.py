"""Two bundles of one model, in turns: python compare_plans.py DENSE PRUNED "two blue cubes on snow"."""

import statistics
import sys

import numpy as np

from fastvar_trt.runtime import Pipeline

RUNS = 3


def main(first: str, second: str, prompt: str) -> None:
    """Print how the second plan differs: in time, step by step, and in the picture."""
    with Pipeline.load(first) as dense, Pipeline.load(second) as pruned:
        features, _ = dense.encode([prompt])
        times: dict[str, list[dict[str, float]]] = {"first": [], "second": []}
        pictures = {}
        for _ in range(RUNS):
            for name, pipe in (("first", dense), ("second", pruned)):
                result = pipe.generate(text_features=features, seeds=1)
                times[name].append(result.timings)
                pictures[name] = result.images[0].astype(np.float64)
    medians = {
        name: {graph: statistics.median(run[graph] for run in runs) for graph in runs[0]}
        for name, runs in times.items()
    }
    for graph, ms in medians["first"].items():
        other = medians["second"].get(graph)
        print(f"{graph:12} {ms:8.1f} ms {'skipped' if other is None else f'{other:8.1f} ms'}")
    total = {name: sum(own.values()) for name, own in medians.items()}
    error = np.mean((pictures["first"] - pictures["second"]) ** 2)
    psnr = "the same picture" if error == 0 else f"PSNR {10 * np.log10(255**2 / error):.1f} dB"
    print(f"{total['first'] / total['second']:.2f} times as fast, {psnr}")


if __name__ == "__main__":
    main(*sys.argv[1:])
