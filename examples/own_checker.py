"""A checker of your own: whether a picture has the mean colour that its line of the prompts' file asks for.

    echo '{"prompt": "snow by day", "tag": "light", "brighter_than": 120}' > prompts.jsonl
    fastvar evaluate out/demo_dense out/demo_pruned --prompts prompts.jsonl --checker examples.own_checker:check

`fastvar` looks for the module in the folder that it is started in, too.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np


def check(picture: np.ndarray, expected: Mapping[str, Any]) -> Mapping[str, bool]:
    """Whether each category holds.

    Args:
        picture: uint8 [H, W, 3].
        expected: the line without `prompt` and `tag`.
    """
    return {"brightness": float(picture.mean()) > expected["brighter_than"]}
