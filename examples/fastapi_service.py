"""A service of your own: BUNDLE=out/demo_pruned uvicorn fastapi_service:app, then GET /picture?prompt=two+red+cones.

(`fastvar serve` is one that is complete; this shows how little is needed.)
"""

import io
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, HTTPException, Response
from PIL import Image

from fastvar_trt.runtime import ImageRequest, OverloadedError, Pipeline, RequestError, Service


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Load the bundle before the first request, and let what runs end after the last."""
    with Pipeline.load(os.environ["BUNDLE"]) as pipe, Service(pipe, max_queue=16) as service:
        pipe.warm_up()
        app.state.service = service
        yield
        service.drain(timeout_s=30)


app = FastAPI(lifespan=lifespan)


@app.get("/picture")
async def picture(prompt: str, seed: int = 0) -> Response:
    """A PNG. Requests that wait together share a batch; a client that goes gives its request up."""
    service: Service = app.state.service
    try:
        result = await service.submit(ImageRequest(prompt=prompt, seed=seed, deadline_s=60))
    except RequestError as error:
        raise HTTPException(422, str(error)) from error
    except OverloadedError as error:
        raise HTTPException(503, str(error)) from error
    file = io.BytesIO()
    Image.fromarray(result.image).save(file, format="PNG")
    return Response(file.getvalue(), media_type="image/png")
