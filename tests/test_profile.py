"""`fastvar profile`: figures with known answers, and the command on a small bundle."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from PIL import Image

from fastvar_trt.runtime import BundleError, read_manifest
from fastvar_trt.runtime.manifest import WEIGHTS_FILE
from fastvar_trt.runtime.weights import read_layout
from fastvar_trt.tools.cli import main
from fastvar_trt.tools.measure import profiling
from fastvar_trt.tools.measure.profiling import GraphProfile, Profile, step_bytes


def _profile(**times: float) -> Profile:
    graphs = tuple(GraphProfile(name, ms, ms, ms, ms, 0.5, 3, 4, 10**9, 4 * 10**6) for name, ms in times.items())
    conditions = {"bundle": "b", "plan": "p", "precision": "fp32"}
    return Profile(conditions, graphs, 0.5, {"gflop_per_s": 400.0, "gbyte_per_s": 8.0}, {"weights": 1.0}, {})


def test_percentiles() -> None:
    found = profiling.statistics_of(list(range(101)))
    assert found == {"mean_ms": 50.0, "p50_ms": 50.0, "p90_ms": 90.0, "p99_ms": 99.0}


def test_rates_are_those_of_the_counted_work() -> None:
    graph = _profile(step_00=10.0).graphs[0]
    assert graph.gflop_per_s == pytest.approx(200.0)  # 2e9 operations in 10 ms
    assert graph.gbyte_per_s == pytest.approx(0.4)
    table = profiling.to_table(_profile(step_00=10.0))
    assert "200.0 (50%)" in table
    assert "0.4 (5%)" in table


def test_bytes_of_a_step(tiny_bundle: Path) -> None:
    manifest = read_manifest(tiny_bundle)
    model = manifest.model
    matrices = 2 * (4 * 128**2 + 2 * 128 * model.mlp_width) + 128 * 96 + 32 * 128  # head and embedding
    keys = 2 * (1 + 9 + 25) + (64 + 32)  # the last layer of the last scale keeps half
    assert step_bytes(manifest, read_layout(tiny_bundle / WEIGHTS_FILE), 3, 1) == 4 * (matrices + 2 * 2 * 128 * keys)


def test_profiles_survive_json_and_others_are_refused() -> None:
    profile = _profile(step_00=1.0, decoder=2.0)
    assert Profile.from_json(json.loads(json.dumps(profile.to_json())), "x") == profile
    for data in ({}, [], {"format_version": 2}, {**profile.to_json(), "graphs": [{"name": 1}]}):
        with pytest.raises(BundleError, match="x: not a profile"):
            Profile.from_json(data, "x")


def test_comparison() -> None:
    table = profiling.comparison_table(_profile(step_00=3.0, step_01=9.0), _profile(step_00=1.5, decoder=2.5))
    lines = [line.split() for line in table.splitlines()]
    assert ["step_00", "3.00", "1.50", "2.00x"] in lines
    assert ["step_01", "9.00", "-", "skipped"] in lines
    assert ["all", "12.00", "4.00", "3.00x"] in lines


def test_the_command(tiny_bundle: Path, tmp_path: Path) -> None:
    run = CliRunner().invoke
    out = tmp_path / "a"
    arguments = ["profile", str(tiny_bundle), "--runs", "3", "--warmup", "1", "--operators", "--out", str(out)]
    done = run(main, arguments)
    assert done.exit_code == 0, done.output
    record = json.loads(done.output.splitlines()[-1])
    profile = Profile.from_json(json.loads((out / "profile.json").read_text()), "a")
    assert record["total_ms"] == pytest.approx(profile.total_ms, abs=1e-3)
    assert [g.name for g in profile.graphs] == ["condition", "step_00", "step_01", "step_02", "step_03", "decoder"]
    assert sum(g.share for g in profile.graphs) == pytest.approx(1, abs=1e-3)
    last = profile.graphs[4]
    assert (last.tokens_kept, last.tokens) == (32, 64)
    assert profile.conditions["runs"] == 3
    assert profile.memory_mib["keys_and_values"] > 0
    for graph in profile.graphs:
        assert graph.p50_ms <= graph.p90_ms <= graph.p99_ms
        operators = profile.operators[graph.name]
        assert operators and list(operators.values()) == sorted(operators.values(), reverse=True)
    assert "Conv" in profile.operators["decoder"]
    assert "Gemm" in profile.operators["step_03"]
    events = json.loads((out / "trace.json").read_text())["traceEvents"]
    graphs = [event for event in events if event["cat"] == "graph"]
    assert [event["name"] for event in graphs] == [g.name for g in profile.graphs]
    assert all(b["ts"] >= a["ts"] + a["dur"] - 1e-6 for a, b in itertools.pairwise(graphs))
    assert "GFLOP/s" in (out / "profile.md").read_text()
    with Image.open(out / "profile.png") as image:
        assert image.size[0] > 500

    compared = run(main, ["profile", "--compare", str(out / "profile.json"), str(out / "profile.json")])
    assert compared.exit_code == 0
    assert "1.00x" in compared.output


def test_two_bundles_in_turns(tiny_bundle: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.symlink_to(tiny_bundle)
    out = tmp_path / "out"
    command = ["profile", str(tiny_bundle), "--beside", str(other), "--runs", "2", "--warmup", "1", "--out", str(out)]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    assert f"A: {other}, B: {tiny_bundle}, run in turns" in done.output
    first, second = (
        Profile.from_json(json.loads((out / name).read_text()), name) for name in ("profile.json", "beside.json")
    )
    assert [p.conditions["bundle"] for p in (first, second)] == [str(tiny_bundle), str(other)]
    assert first.conditions["runs"] == second.conditions["runs"] == 2
    assert first.ceiling == second.ceiling  # measured once
    assert "B is faster" in (out / "profile.md").read_text()


def test_pipelines_run_in_turns() -> None:
    order: list[tuple[str, int, bool]] = []

    class Recorder:
        on_cpu = False

        def __init__(self, name: str) -> None:
            self.name = name

        def run(self, number: int, *, counts: bool) -> None:
            order.append((self.name, number, counts))

        def profile(self, warmup: int) -> Profile:
            return _profile(**{self.name: float(warmup)})

    recorders: Any = [Recorder("a"), Recorder("b")]
    found = profiling.measure(recorders, warmup=1, runs=2)
    assert [(p.graphs[0].name, p.total_ms, p.ceiling) for p in found] == [("a", 1.0, {}), ("b", 1.0, {})]
    assert order == [(name, number, number > 0) for number in range(3) for name in "ab"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "give a BUNDLE, or --compare"),
        (["B", "--batch", "3"], 1, "tiny holds 1, 2; export with --batch 3"),
        (["B", "--operators", "--device", "cuda"], 2, "ONNX Runtime's profiler is read on the CPU only"),
        (["B", "--beside", "B", "--out", "unused"], 1, "has the name and the plan of"),
        (["--compare", "M", "M"], 1, "not a profile of `fastvar profile`"),
        (["--compare", "M", "M", "--out", "unused"], 2, "--compare runs and writes nothing"),
        (["--compare", "M", "M", "--estimate", "rtx3090"], 2, "--compare runs and writes nothing"),
        (["--compare", "none.json", "M"], 1, "cannot be read as JSON"),
    ],
)
def test_bad_input(arguments: list[str], code: int, message: str, tiny_bundle: Path) -> None:
    names = {"B": str(tiny_bundle), "M": str(tiny_bundle / "manifest.json")}
    result = CliRunner().invoke(main, ["profile", *[names.get(a, a) for a in arguments]])
    assert result.exit_code == code
    assert message in result.output
