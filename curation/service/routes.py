"""The API. Each call looks up what the request names and answers with a model."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, File, Header, Query, Request, UploadFile
from fastapi import Path as PathPart
from fastapi.responses import (
    FileResponse,
    JSONResponse,
    RedirectResponse,
    Response,
    StreamingResponse,
)
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.concurrency import run_in_threadpool

from curation.runtime.store import StoreError
from curation.service import models
from curation.service.auth import reads, submits
from curation.service.metrics import exposition
from curation.service.readers import Service
from curation.service.runs import NotThere, Run

PAGE = 100
MAX_PAGE = 1_000
POLL_S = 1.0
PING_S = 15.0
FOREVER = {"Cache-Control": "private, max-age=31536000, immutable"}  # keys are content hashes
FAULTS: dict[int | str, dict[str, Any]] = {
    code: {"model": models.Fault}
    for code in (400, 401, 403, 404, 408, 413, 421, 422, 429, 502, 503)
}

probes = APIRouter(tags=["probes"])
api = APIRouter(prefix="/api", dependencies=[Depends(reads)], responses=FAULTS)

RunName = Annotated[str, PathPart(examples=["demo~run"], max_length=500)]
ShardName = Annotated[str, PathPart(examples=["000000.tar"], max_length=200)]
ImageId = Annotated[
    str, PathPart(examples=["4c1a9f02"], description="sha256, 8 digits of it at least")
]
Offset = Annotated[int, Query(ge=0, le=10**12)]
Limit = Annotated[int, Query(ge=1, le=MAX_PAGE)]


async def _service(request: Request) -> Service:
    found: Service = request.app.state.service
    return found


Readers = Annotated[Service, Depends(_service)]


@probes.get("/healthz")
async def healthz() -> dict[str, str]:
    """The process is alive."""
    return {"status": "ok"}


@probes.get("/readyz", responses={503: {"model": models.Fault}})
def readyz(readers: Readers) -> Any:
    """The runs can be read."""
    try:
        readers.catalog.all()
    except StoreError:
        return JSONResponse({"error": "the store of runs can't be read"}, 503)
    return {"status": "ok"}


@probes.get("/metrics", dependencies=[Depends(reads)], response_class=Response, responses=FAULTS)
def metrics(readers: Readers) -> Response:
    """For Prometheus: every run as it stands, and this service's requests."""
    return Response(exposition(readers.requests), media_type=CONTENT_TYPE_LATEST)


@api.get("/runs", tags=["runs"])
def runs(readers: Readers) -> models.Runs:
    """All runs, the one with the latest sign of life first."""
    return models.Runs(runs=readers.catalog.summaries())


@api.get("/runs/{run}", tags=["runs"])
def one_run(run: RunName, readers: Readers) -> models.Run:
    """One run of curation: stages, funnel, composition."""
    return readers.catalog.run(run).describe()


@api.get("/runs/{run}/pretraining", tags=["runs"])
def pretraining(run: RunName, readers: Readers) -> models.Curves:
    """Losses, throughput, data wait and kNN accuracy of a run of pretraining."""
    return readers.catalog.pretraining(run).curves()


@api.get("/runs/{run}/stages/{stage}", tags=["runs"])
def one_stage(run: RunName, stage: str, readers: Readers) -> models.Stage:
    """One stage: how far it is, how fast, what failed."""
    for found in readers.catalog.run(run).stages():
        if found.stage == stage:
            return models.Stage(**found.model_dump())
    raise NotThere(f"no stage '{stage[:40]}'; a run's stages are in /api/runs/{run[:80]}")


@api.get(
    "/runs/{run}/events",
    tags=["runs"],
    response_class=StreamingResponse,
    responses={200: {"content": {"text/event-stream": {}}, "description": "server-sent events"}},
)
async def events(
    run: RunName,
    readers: Readers,
    last_event_id: Annotated[str, Header(max_length=200)] = "",
) -> StreamingResponse:
    """Server-sent events: `stages` whenever one has changed, and each `event` that a stage wrote.

    A client that reconnects with `Last-Event-ID` misses none.
    """
    found = await run_in_threadpool(readers.catalog.run, run)
    return StreamingResponse(_follow(found, last_event_id), media_type="text/event-stream")


async def _follow(run: Run, place: str) -> AsyncIterator[str]:
    place = place or await run_in_threadpool(run.events.recent)
    shown, quiet = "", 0.0
    while True:
        stages = await run_in_threadpool(run.stages)
        text = json.dumps([stage.model_dump() for stage in stages])
        new, place = await run_in_threadpool(run.events.read, place)
        if text != shown:
            yield f"event: stages\ndata: {text}\n\n"
        if new:
            lines = "".join(f"event: event\ndata: {json.dumps(one)}\n\n" for one in new[:-1])
            yield f"{lines}id: {place}\nevent: event\ndata: {json.dumps(new[-1])}\n\n"
        quiet = 0.0 if new or text != shown else quiet + POLL_S
        if quiet >= PING_S:
            yield ": still here\n\n"
            quiet = 0.0
        shown = text
        if not new:
            await asyncio.sleep(POLL_S)


@api.get("/runs/{run}/shards", tags=["shards"])
def shards(
    run: RunName, readers: Readers, offset: Offset = 0, limit: Limit = PAGE
) -> models.Shards:
    """A page of the run's shards; while they are written, those that are there."""
    return readers.shards.page(readers.catalog.run(run), offset, limit)


@api.get("/runs/{run}/shards/{shard}", tags=["shards"])
def one_shard(
    run: RunName, shard: ShardName, readers: Readers, offset: Offset = 0, limit: Limit = PAGE
) -> models.ShardSamples:
    """A page of a shard's images."""
    return readers.shards.samples(readers.catalog.run(run), shard, offset, limit)


@api.api_route(
    "/runs/{run}/shards/{shard}/download",
    methods=["GET", "HEAD"],
    tags=["shards"],
    response_class=Response,
    responses={
        200: {"content": {"application/x-tar": {}}, "description": "the tar; honours Range"},
        307: {"description": "a URL of the store that holds for a quarter of an hour"},
    },
)
def download(run: RunName, shard: ShardName, readers: Readers) -> Response:
    """The tar itself: from the store by a presigned URL, or from the folder."""
    found = readers.catalog.run(run)
    link = readers.shards.link(found, shard)
    if link is not None:
        return RedirectResponse(link, 307)
    path = readers.shards.local_path(found, shard)
    return FileResponse(path, media_type="application/x-tar", filename=f"{found.name}-{path.name}")


@api.get(
    "/runs/{run}/shards/{shard}/{key}",
    tags=["shards"],
    response_class=Response,
    responses={200: {"content": {"image/*": {}}, "description": "the image"}},
)
def sample(
    run: RunName,
    shard: ShardName,
    key: str,
    readers: Readers,
    thumbnail: Annotated[int | None, Query(ge=16, le=512, description="pixels a side")] = None,
) -> Response:
    """The original bytes of an image, or a thumbnail (WebP) of it."""
    found = readers.catalog.run(run)
    if thumbnail is not None:
        data = readers.pictures.of_sample(found, shard, key, thumbnail)
        return Response(data, media_type="image/webp", headers=FOREVER)
    data, kind = readers.shards.image(found, shard, key)
    return Response(data, media_type=kind, headers=FOREVER)


@api.get("/runs/{run}/images", tags=["images"])
def by_key(
    run: RunName,
    readers: Readers,
    key: Annotated[str, Query(min_length=1, max_length=1000, examples=["coffee-003.jpg"])],
    start: Annotated[int, Query(ge=0, le=10**9, description="`next` of the answer before")] = 0,
) -> models.Found:
    """Images by key, or by how it ends after a `/`. Looks for two seconds; `next` goes on."""
    return readers.lineage.by_key(readers.catalog.run(run), key, start)


@api.get("/runs/{run}/images/{id}", tags=["images"])
def story(run: RunName, id: ImageId, readers: Readers) -> models.Story:
    """The lineage of an image: where it came from, what was decided and why, what is near."""
    return readers.lineage.story(readers.catalog.run(run), id)


@api.get(
    "/runs/{run}/images/{id}/thumbnail",
    tags=["images"],
    response_class=Response,
    responses={200: {"content": {"image/webp": {}}, "description": "the picture"}},
)
def thumbnail(
    run: RunName,
    id: ImageId,
    readers: Readers,
    side: Annotated[int, Query(ge=16, le=512, description="pixels")] = 176,
) -> Response:
    """A picture of any input image, selected or not, where its bytes can be read."""
    found = readers.catalog.run(run)
    image = readers.lineage.first(found, id)
    data = readers.pictures.of_image(found, image, side)
    return Response(data, media_type="image/webp", headers=FOREVER)


@api.get("/runs/{run}/images/{id}/nearest", tags=["images"])
def nearest(
    run: RunName, id: ImageId, readers: Readers, k: Annotated[int, Query(ge=1, le=100)] = 12
) -> models.SearchAnswer:
    """The run's images nearest to one of them, by the run's encoder."""
    found = readers.catalog.run(run)
    return readers.searcher.neighbours(found, readers.lineage.first(found, id), k)


@api.post("/runs/{run}/search", tags=["images"])
def search(
    run: RunName,
    readers: Readers,
    image: Annotated[UploadFile, File(description="JPEG, PNG, WebP, …; at most 20 MB")],
    k: Annotated[int, Query(ge=1, le=100)] = 12,
) -> models.SearchAnswer:
    """The run's images nearest to an uploaded one, by the run's encoder."""
    return readers.searcher.nearest(readers.catalog.run(run), image.file.read(), k)


@api.post("/jobs", tags=["jobs"], status_code=202, dependencies=[Depends(submits)])
def submit(recipe: models.Recipe, readers: Readers) -> models.Job:
    """Sends a recipe to the Ray cluster. Needs the scope `submit`."""
    return readers.jobs.submit(recipe.recipe)


@api.get("/jobs/{job}", tags=["jobs"])
def one_job(job: str, readers: Readers) -> models.Job:
    """How a job stands."""
    return readers.jobs.describe(job)


@api.get("/jobs/{job}/logs", tags=["jobs"])
def logs(job: str, readers: Readers) -> models.JobLogs:
    """What a job printed so far."""
    return readers.jobs.logs(job)


@api.post("/jobs/{job}/cancel", tags=["jobs"], dependencies=[Depends(submits)])
def cancel(job: str, readers: Readers) -> models.Job:
    """Asks a job to stop; its finished parts are kept. Needs the scope `submit`."""
    return readers.jobs.cancel(job)
