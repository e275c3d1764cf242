"""What the API answers: the models of its OpenAPI, which the Python client parses into again."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

State = Literal["waiting", "running", "done", "failed", "stalled", "stopped"]


class Answer(BaseModel):
    """Unknown fields are let through, so that an older client reads a newer service."""

    model_config = ConfigDict(frozen=True)


class Stage(Answer):
    """One stage of a run. Rates are images a second since the stage began to work."""

    stage: str = Field(examples=["embed"])
    state: State
    message: str = Field("", examples=["no sign of life for 48 s; run again"])
    done: int = 0
    total: int = 0
    reused: int = 0
    workers: int = 0
    rate_per_second: float | None = None
    eta_seconds: float | None = None
    seconds: float | None = Field(None, description="since it began; how long it took once done")
    failures: dict[str, int] = Field({}, examples=[{"truncated": 3, "part_failed": 1}])
    heartbeat: float | None = Field(None, description="seconds since 1970")


class Step(Answer):
    """A bar of the funnel: images that are left, and those that went, by reason."""

    name: str = Field(examples=["distinct"])
    images: int
    lost: dict[str, int] = {}
    added: int = 0


class CompositionRow(Answer):
    """A set and a way of retrieval, as in table 15 of the DINOv2 paper."""

    set: str
    images: int
    retrieval: str
    retrieved: int
    distinct: int
    final: int
    median_cosine: float | None


class RunSummary(Answer):
    """One run as a list shows it."""

    run: str = Field(examples=["demo~run"], description="its name in every other call")
    path: str = Field(examples=["demo/run"])
    kind: Literal["curation", "pretraining"]
    state: State | Literal["unreadable"]
    message: str = Field("", description="why it can't be read")
    stage: str | None = Field(None, description="the stage that runs, or that stopped it")
    share: float | None = Field(None, description="of the stage's images that are done")
    images: int | None = Field(None, description="input images")
    selected: int | None = None
    updated: float | None = Field(None, description="last sign of life, seconds since 1970")


class Run(RunSummary):
    """Everything a run's page shows but its shards."""

    name: str
    stages: list[Stage] = []
    funnel: list[Step] = []
    decisions: dict[str, int] | None = None
    composition: list[CompositionRow] = []
    notices: list[str] = []
    shards: int | None = None
    shard_bytes: int | None = None
    manifest_hash: str | None = None


class Runs(Answer):
    runs: list[RunSummary]


class Curves(Answer):
    """Series of a pretraining run, thinned to some hundred points each; (iteration, value)."""

    run: str
    iteration: int
    iterations: int | None = Field(None, description="of the whole training")
    losses: dict[str, list[tuple[int, float]]]
    series: dict[str, list[tuple[int, float]]] = Field(
        examples=[{"images_per_s": [(10, 812.5)], "data_wait": [(10, 0.01)]}]
    )
    not_finite: list[str] = Field([], description="losses that are infinite or no number now")


class Shard(Answer):
    shard: str = Field(examples=["000000.tar"])
    images: int
    bytes: int
    sha256: str


class Shards(Answer):
    """A page of a run's shards. `complete`: all are written, the manifest is there."""

    total: int
    offset: int
    complete: bool
    shards: list[Shard]


class Sample(Answer):
    """An image in a shard; `key` is also its id."""

    key: str
    member: str
    bytes: int


class ShardSamples(Answer):
    """A page of a shard's images, in the order of the tar."""

    shard: Shard
    total: int
    offset: int
    samples: list[Sample]


class RetrievedBy(Answer):
    set: str
    query_id: str | None
    how: str
    cosine: float | None


class Image(Answer):
    """The row of one input image in the run's lineage."""

    id: str | None
    source: str
    set: str | None
    uri: str
    key: str
    decision: str = Field(examples=["duplicate"])
    reason: str = Field(examples=["duplicate_of 4c1a… cosine 0.912"])
    component: int | None
    retrieved_by: list[RetrievedBy]
    shard: str | None
    width: int | None
    height: int | None
    bytes: int | None
    image: int = Field(description="its number in the run")
    unsafe: float | None = Field(description="the safety filter's score, where there is a filter")
    faces_blurred: int | None = Field(description="how many, where bytes were changed for it")
    phash_duplicate_of: str | None = Field(
        None, description="a better image whose perceptual hash is near, where those are looked for"
    )
    phash_bits: int | None = Field(None, description="in how many of 64 bits the hashes differ")


class Story(Answer):
    """Images of one id (several when the same bytes came in more than once) and what is near."""

    images: list[Image]
    duplicates: list[Image] = Field(description="of the same group, the one that stays first")
    brought: list[Image] = Field(description="images that were retrieved for this query")


class Found(Answer):
    """Images by key. `next` goes on with the search; null when all parts have been looked at."""

    images: list[Image]
    parts: int
    searched: int
    next: int | None


class Hit(Answer):
    cosine: float
    image: Image


class SearchAnswer(Answer):
    """The nearest images of a run. Not `complete`: time ran out after `searched` of `images`."""

    hits: list[Hit]
    searched: int
    images: int
    complete: bool


class Recipe(BaseModel):
    """A recipe to run on the Ray cluster; its output must lie below the served runs."""

    model_config = ConfigDict(extra="forbid")

    recipe: str = Field(
        min_length=1,
        max_length=64_000,
        description="YAML",
        examples=[
            "name: birds\noutput: s3://bucket/runs/birds\nsources:\n  pool: [{uri: s3://bucket/c}]\n"
            "  curated: {birds: {uri: s3://bucket/birds}}\n"
        ],
    )


class Job(Answer):
    job: str = Field(examples=["lvd-3f2a9c0d1e4b5a67"])
    state: str = Field(examples=["RUNNING"], description="as Ray says it")
    message: str = ""
    output: str | None = Field(None, description="where the run goes")
    started: float | None = None
    ended: float | None = None


class JobLogs(Answer):
    job: str
    logs: str = Field(description="the end of them, at most a megabyte")


class Fault(Answer):
    """Every error: one line for people."""

    error: str = Field(examples=["no run 'brids'; GET /api/runs lists them"])
