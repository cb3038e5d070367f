"""`fastvar evaluate`: compliance of pictures with their prompts, for any checker."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from fastvar_trt.export.exporter import ExportOptions, ExportReport
from fastvar_trt.export.models.infinity.schedules import schedule
from fastvar_trt.export.models.infinity.source import InfinitySource
from fastvar_trt.export.models.t5 import T5Source
from fastvar_trt.runtime.errors import RequestError
from fastvar_trt.runtime.plan import PruningPlan
from fastvar_trt.tools.cli import main
from fastvar_trt.tools.measure import tune
from fastvar_trt.tools.measure.compare import Pictures
from fastvar_trt.tools.measure.evaluate import BundleResult, Evaluation, Share, load_checker, read_cases
from fastvar_trt.tools.random_checkpoints import random_infinity_checkpoint
from fastvar_trt.tools.scenes.cases import cases, check
from fastvar_trt.tools.scenes.renderer import render
from fastvar_trt.tools.scenes.world import Scene, Solid
from fastvar_trt.tools.train_scenes.config import TextConfig
from fastvar_trt.tools.train_scenes.text import T5Encoder, write_text_encoder
from fastvar_trt.tools.train_scenes.text_stage import captions_tokenizer

Export = Callable[..., tuple[Path, ExportReport]]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory, export_once: Export) -> tuple[Path, Path]:
    """A dense and a pruned bundle of a small model of text that was never trained."""
    text = TextConfig(width=64, text_length=40)
    torch.manual_seed(0)
    tokenizer = captions_tokenizer(text)
    folder = tmp_path_factory.mktemp("text") / "t5"
    write_text_encoder(folder, T5Encoder(text.sizes(tokenizer.get_vocab_size())), tokenizer)
    maps, span = schedule("0.06M", 1.0)
    states = random_infinity_checkpoint(depth=2, width=64, num_heads=2, text_width=64, text_length=40)
    source = InfinitySource.from_state(*states, maps[:4], span)
    source = dataclasses.replace(source, text=T5Source.from_folder(folder, 40, 64))
    plan = PruningPlan("pruned", ((3, 0.5),), cache_scale=2)
    return (
        export_once("evaluate_dense", source, ExportOptions())[0],
        export_once("evaluate_pruned", source, ExportOptions(plan=plan))[0],
    )


def run(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(main, ["evaluate", *map(str, arguments)])
    return done.exit_code, done.output


def test_cases_are_what_their_pictures_show() -> None:
    found = cases(6, seed=1)
    assert [case.tag for case in found] == ["one solid", "two solids", "three solids"] * 2
    assert found == cases(6, seed=1) != cases(6, seed=2)
    for case in found:
        expected = json.loads(json.dumps(case.expected))  # as it comes from a file
        solids = tuple(Solid(**solid) for solid in expected["scene"]["solids"])
        scene = Scene(**{**expected["scene"], "solids": solids})
        assert all(check(render(scene, (256, 256)), expected).values())
        wrong = dataclasses.replace(scene, sky="night" if scene.sky != "night" else "day")
        assert not check(render(wrong, (256, 256)), expected)["sky"]


def test_wilson_interval() -> None:
    """The values of Newcombe (1998), table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29."""
    for held, count, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert Share(held, count).interval == pytest.approx((low, high), abs=1e-4)


def test_pairs_of_verdicts() -> None:
    """One prompt that only the other complies with, two that only the first does, one that both and one that none."""
    verdicts = ((False, True, True, True, False), (True, False, False, True, False))
    results = [
        # Of two categories, of which the first always holds: what counts is that all of them do.
        BundleResult(tuple({"sky": True, "count": held} for held in own), (), (), {})
        for own in verdicts
    ]
    evaluation = Evaluation(tuple(cases(5)), ("first", "other"), tuple(results), ())
    assert evaluation.only_one_complies(1) == (1, 2) and evaluation.only_one_complies(0) == (0, 0)


def test_two_bundles_on_scenes(bundles: tuple[Path, Path], tmp_path: Path) -> None:
    code, output = run(*bundles, "--scenes", 3, "-o", tmp_path / "s.png", "--json", tmp_path / "e.json")
    assert code == 0, output
    data = json.loads((tmp_path / "e.json").read_text())
    assert data == json.loads(output.splitlines()[-1]) and data["cases"] == 3
    dense, pruned = data["bundles"]
    assert set(dense["compliance"]) == {"ground", "sky", "count", "shape", "colour", "binding", "position", "all"}
    assert dense["compliance"]["ground"]["all"]["count"] == 3 and dense["compliance"]["sky"]["one solid"]["count"] == 1
    assert dense["against_first"] is None and dense["speedup_call"] == 1.0
    assert 0 < pruned["against_first"]["ssim"] < 1
    alone = [pruned["against_first"][f"only_{which}_complies"] for which in ("this", "first")]
    held = [own["compliance"]["all"]["all"]["value"] * 3 for own in (pruned, dense)]
    assert alone[0] - alone[1] == pytest.approx(held[0] - held[1], abs=1e-3)
    assert set(pruned["step_ms"]) == {"condition", *(f"step_{k:02d}" for k in range(4)), "decoder"}
    assert Image.open(tmp_path / "s.png").width > 2 * 256
    assert "three solids" in output and "speed-up of the steps" in output


def test_a_checker_of_the_user(bundles: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_checker.py").write_text(
        "def bright(picture, expected):\n"
        "    return {'bright': picture.mean() > expected['level'], 'size': picture.shape[0] == expected['side']}\n"
        "def whole(picture, expected):\n"
        "    return {'all': True}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    prompts = tmp_path / "prompts.jsonl"
    levels = {"easy": -1, "hard": 256}
    lines = [{"prompt": f"{tag} snow", "tag": tag, "level": level, "side": 96} for tag, level in levels.items()]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = [bundles[0], "--prompts", prompts, "--checker", "my_checker:bright"]
    code, output = run(*arguments, "--no-vif")
    assert code == 0, output
    compliance = json.loads(output.splitlines()[-1])["bundles"][0]["compliance"]
    assert compliance["bright"]["easy"]["value"] == 1.0 and compliance["bright"]["hard"]["value"] == 0.0
    assert compliance["all"]["all"]["value"] == 0.5

    prompts.write_text('{"prompt": "snow"}\n')
    code, output = run(*arguments)
    assert code == 1 and "the checker failed on the prompt 'snow'" in output and "KeyError" in output
    prompts.write_text(json.dumps(lines[0]) + "\n")
    code, output = run(bundles[0], "--prompts", prompts, "--checker", "my_checker:whole")
    assert code == 1 and "got the categories all for the prompt 'easy snow'" in output


@pytest.mark.parametrize("line", ["[1]", '{"tag": "x"}', "{", '{"prompt": 3}', '{"prompt": "x", "tag": "all"}'])
def test_a_file_of_prompts_that_is_none(line: str, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a fox"}\n' + line + "\n")
    with pytest.raises(RequestError, match=r"line 2: .*expected a JSON object"):
        read_cases(path)


def test_bad_arguments(bundles: tuple[Path, Path], tiny_bundle: Path, tmp_path: Path) -> None:
    for name in ("json", "no_such_module:f", "json:no_such_function", ":f", ".x:f"):
        with pytest.raises(RequestError, match="expected module:function, of what can be imported"):
            load_checker(name)
    with pytest.raises(RequestError, match="got a str, expected a function"):
        load_checker("json:__doc__")
    for arguments in (
        [],
        ["--scenes", 1, "--prompts", tmp_path],
        ["--prompts", tmp_path],
        ["--scenes", 1, "--checker", "json:loads"],
        ["--prompts", tmp_path, "--checker", "json:loads", "--trained"],
    ):
        assert run(bundles[0], *arguments)[0] == 2
    code, output = run(tiny_bundle, "--scenes", 1)
    assert code == 1 and "draws classes, expected one that draws from text" in output
    file_of_prompts = ("--checker", "json:loads", "--prompts")
    code, output = run(bundles[0], *file_of_prompts, tmp_path / "none")
    assert code == 1 and "cannot be read" in output
    (tmp_path / "empty").write_text("\n")
    code, output = run(bundles[0], *file_of_prompts, tmp_path / "empty")
    assert code == 1 and "has no line" in output
    (tmp_path / "long").write_text(json.dumps({"prompt": "red " * 50}) + "\n")
    code, output = run(bundles[0], *file_of_prompts, tmp_path / "long")
    assert code == 1 and "got 51 tokens, this bundle takes up to 40" in output


def test_the_sweep_of_plans_draws_prompts_as_the_runtime_does(bundles: tuple[Path, Path], tmp_path: Path) -> None:
    pictures = Pictures(("a red cube on sand", "two blue cones on grass at night"), (0, 1))
    plan = PruningPlan("half", ((3, 0.5),), cache_scale=2)
    study = tune.Study(bundles[0], pictures, cfg=3.0)
    (candidate,) = tune.measure_front(study, tune.sweep(study, [plan]), tmp_path).candidates
    assert candidate.measured is not None and candidate.metrics.ssim < 0.999
    assert candidate.measured.mean.ssim == pytest.approx(candidate.metrics.ssim, abs=1e-3)
    with pytest.raises(RequestError, match="got 51 tokens, this bundle takes up to 40"):
        tune.check(bundles[0], [plan], Pictures(("red " * 50,), (0,)))


def test_plans_are_chosen_by_what_pictures_show(bundles: tuple[Path, Path], tmp_path: Path) -> None:
    lines = [json.dumps({"prompt": f"{n} cubes", "side": 96}) for n in range(4)]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    (tmp_path / "look.py").write_text(
        "def look(picture, expected):\n    return {'even': int(picture.sum()) % 2 == 0, 'n': expected['side'] == 96}\n"
    )
    arguments = ["tune", bundles[0], "--prompts", tmp_path / "p.jsonl", "--checker", "look:look", "--budget", 9]
    arguments += ["--fractions", "0.5", "--fractions", "0.75", "--cache-scales", "-2", "--first-layers", "0"]
    arguments += ["--unguided-from", "-1", "--max-loss", 1, "--out", tmp_path / "tuned"]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "tuned" / "tune.json").read_text())
    found = sorted((c["images"], c["compliance"]["count"], c["on_front"]) for c in record["candidates"])
    assert found == [(1, 1, False), (1, 1, False), (2, 2, False), (4, 4, True)]  # 4 + 2 + 2 pictures
    chosen = json.loads((tmp_path / "tuned" / "plan.json").read_text())
    (front,) = (c for c in record["candidates"] if c["on_front"])
    assert chosen["measured"]["compliance"] == front["compliance"]

    for more in (("--prompt", "a fox"), ("--class", 1), ("--scenes", 1), ("--seeds", 2)):
        assert CliRunner().invoke(main, [str(a) for a in (*arguments, *more)]).exit_code == 2
    less = [str(argument) if argument != 9 else "3" for argument in arguments]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        refused = CliRunner().invoke(main, less)
    assert refused.exit_code == 1 and "--budget 3: 4 candidates and 4 pictures need 8 at least" in refused.output


def test_compare_takes_prompts(bundles: tuple[Path, Path], tiny_bundle: Path) -> None:
    done = CliRunner().invoke(main, ["compare", *map(str, bundles), "--prompt", "a red cube on sand", "--seeds", "2"])
    assert done.exit_code == 0, done.output
    data = json.loads(done.output.splitlines()[-1])
    assert data["images"] == 2 and set(data["prompts"]) == {"a red cube on sand"}
    for bundle, option, message in (
        (bundles[0], ["--class", "1"], "draws from text: give --prompt"),
        (tiny_bundle, ["--prompt", "x"], "draws classes; give --class"),
    ):
        refused = CliRunner().invoke(main, ["compare", str(bundle), str(bundle), *option])
        assert refused.exit_code == 1 and message in refused.output
