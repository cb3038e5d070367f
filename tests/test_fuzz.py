"""Damaged manifests and senseless requests: each is refused with a typed error or works, and none ends the process."""

from __future__ import annotations

import copy
import functools
import io
import json
import math
import operator
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastvar_trt.runtime import BundleError, FastVARError, Pipeline, Service
from fastvar_trt.runtime.manifest import MANIFEST_FILE, Manifest
from fastvar_trt.runtime.request import check_inputs
from fastvar_trt.serving.http.app import ServerOptions, create_app
from fuzzing import FUZZ, PATHS, answers_to_valid_bodies

_NUMBERS = st.one_of(st.integers(), st.sampled_from([0, 1, -1, 2**31, 2**63, 10**30]), st.floats())
_JSON = st.recursive(
    st.none() | st.booleans() | _NUMBERS | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
_NAMES = ["", "fp16", "float16", "labels", "step_00.onnx", "../weights.safetensors", "/etc/hostname"]


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where everything of a JSON value is."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += _paths(inner, (*path, key))
    return found


def _damaged(manifest: dict[str, Any], path: tuple[Any, ...], action: str, value: Any) -> dict[str, Any]:
    result = copy.deepcopy(manifest)
    place: Any = result
    for key in path[:-1]:
        place = place[key]
    if action == "remove":
        del place[path[-1]]
    elif action == "repeat" and isinstance(place, list):
        place.append(place[path[-1]])
    elif action == "shift" and isinstance(place[path[-1]], int):
        place[path[-1]] += 1 if isinstance(value, float) else -1
    else:
        place[path[-1]] = value
    return result


def test_damaged_manifests(tiny_bundle: Path, tmp_path: Path) -> None:
    for file in tiny_bundle.iterdir():
        if file.name != MANIFEST_FILE:
            shutil.copyfile(file, tmp_path / file.name)
    manifest = json.loads((tiny_bundle / MANIFEST_FILE).read_text())
    sections = [[path for path in _paths(manifest) if path[0] == key] for key in manifest]
    outcomes: Counter[str] = Counter()

    @settings(FUZZ, max_examples=120)
    @given(
        st.sampled_from(sections).flatmap(st.sampled_from),
        st.sampled_from(["remove", "repeat", "shift", "replace", "replace"]),
        _JSON | st.sampled_from(_NAMES),
    )
    def check(path: tuple[Any, ...], action: str, value: Any) -> None:
        (tmp_path / MANIFEST_FILE).write_text(json.dumps(_damaged(manifest, path, action, value)))
        try:
            with Pipeline.load(tmp_path, check="size") as pipe:
                pipe.generate([1])
        except FastVARError as error:
            outcomes[type(error).__name__] += 1
        else:
            outcomes["works"] += 1

    check()
    assert outcomes["BundleError"] > 60
    assert outcomes.total() >= 120


def test_no_tensor_can_do_without_its_role(tiny_bundle: Path) -> None:
    """Nothing is read out of names: a tensor of another role is seen before anything runs."""
    manifest = json.loads((tiny_bundle / MANIFEST_FILE).read_text())
    paths = [path for path in _paths(manifest) if path[-1] == "role" and path[0] == "variants"]
    assert len(paths) > 150
    for path in paths:
        if functools.reduce(operator.getitem, path, manifest) == "state":
            continue
        with pytest.raises(BundleError):
            check_inputs(Manifest.from_json(_damaged(manifest, path, "replace", "state"), "manifest.json"))


def test_the_schema_says_what_the_bundle_takes(tiny_bundle: Path) -> None:
    with TestClient(create_app(Service(Pipeline.load(tiny_bundle), max_wait_s=0))) as client:
        answers = answers_to_valid_bodies(client, 60)
    assert set(answers) <= {"200", "504"}  # a deadline may be as short as one likes
    assert answers["200"] > 80


def _body() -> st.SearchStrategy[Any]:
    fields: dict[str, st.SearchStrategy[Any]] = {
        "label": st.integers(-2, 12),
        "prompt": st.text(max_size=40),
        "negative_prompt": st.text(max_size=40),
        "text_features": st.lists(st.lists(_NUMBERS, max_size=4), max_size=4),
        "seed": st.integers(-1, 2**64),
        "cfg": st.floats(),
        "temperature": st.floats(0, 4),
        "top_k": st.integers(-1, 100),
        "top_p": st.floats(-0.1, 1.1),
        "deadline_s": st.floats(),
        "format": st.sampled_from(["png", "jpeg", "webp", "gif"]),
        "quality": st.integers(-1, 101),
        "preview_scales": st.lists(st.integers(-1, 4), max_size=4),
    }
    labelled = {name: fields[name] for name in ("seed", "cfg", "top_k", "format", "quality")}
    sensible = st.fixed_dictionaries({"label": st.integers(0, 9)}, optional=labelled)
    return sensible | st.fixed_dictionaries({}, optional={name: s | _JSON for name, s in fields.items()}) | _JSON


def test_senseless_requests(tiny_bundle: Path) -> None:
    pipe = Pipeline.load(tiny_bundle)
    expected = pipe.generate([1], seeds=[1]).images[0]
    service = Service(pipe, max_wait_s=0)
    statuses: Counter[int] = Counter()
    with TestClient(create_app(service, ServerOptions(max_body_bytes=2000)), raise_server_exceptions=False) as client:

        @settings(FUZZ, max_examples=400)
        @given(st.sampled_from(PATHS), st.binary(max_size=40) | _body())
        def check(path: str, body: Any) -> None:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            answer = client.post(path, content=content, headers={"content-type": "application/json"})
            statuses[answer.status_code] += 1
            allowed = {200, 400, 413, 422}
            if isinstance(body, dict) and isinstance(body.get("deadline_s"), float) and body["deadline_s"] < 1:
                allowed.add(504)
            assert answer.status_code in allowed, (body, answer.text)
            if answer.status_code != 200:
                assert set(answer.json()["error"]) == {"type", "message"}

        check()
        assert service.healthy
        assert statuses[200] > 20
        assert statuses[422] > 100
        answer = client.post("/v1/images", json={"label": 1, "seed": 1})
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(answer.content))), expected)
    assert service.metrics().failed == 0
    assert math.isfinite(service.metrics().latency_sum_s)
