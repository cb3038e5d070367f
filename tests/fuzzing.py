"""What the fuzzing tests share."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis_jsonschema import from_schema

PATHS = ("/v1/images", "/v1/images/stream")
# Not the clock: machines differ. Examples are the same in every run, so that a failure is somebody's change.
FUZZ = settings(
    deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck), print_blob=True
)


def answers_to_valid_bodies(client: TestClient, examples: int, only: str | None = None) -> Counter[str]:
    """Send bodies that are valid by the server's own schema.

    Args:
        client: of the server.
        examples: how many, per path.
        only: a property that the bodies must have.

    Returns:
        status, and the message where it is 4xx -> how many.
    """
    answers: Counter[str] = Counter()
    document = client.get("/openapi.json").json()
    for path in PATHS:
        content = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        schema = {**content["schema"], "components": document["components"]}
        if only is not None:
            schema = {"allOf": [schema, {"required": [only]}], "components": document["components"]}
        _send(client, path, schema, examples, answers)
    return answers


def _send(client: TestClient, path: str, schema: dict[str, Any], examples: int, answers: Counter[str]) -> None:
    @settings(FUZZ, max_examples=examples)
    @given(from_schema(schema))
    def check(body: Any) -> None:
        answer = client.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
        message = f": {answer.json()['error']['message']}" if 400 <= answer.status_code < 500 else ""
        answers[f"{answer.status_code}{message}"] += 1

    check()
