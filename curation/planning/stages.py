"""What every step of every stage asks of a machine, by the algorithms that the stages use.

A `Step` is counted in seconds of one core (or GPU), bytes and requests; the planner spreads it over
nodes. Sizes of blocks come from the stages themselves, rates from `constants.yaml`.
"""

import math
from collections.abc import Iterator
from dataclasses import replace

from curation.algorithms import groups, hamming
from curation.planning.job import BLOCK, IMAGES, TABLE, UPLOAD_PART, VECTORS, Job, Step, driver
from curation.planning.search import LOAD, PAIR, Ask, search
from curation.runtime.store import REQUESTS
from curation.stages import centroids, cluster_sample, draws, report_examples, shard_plan

READ_AHEAD = 1 << 20  # bytes of a request within an archive
LISTED = 1000  # objects of one LIST request
IMAGE_ROW, MEMBER_ROW, LINEAGE_ROW = 120, 70, 150  # bytes an image in these tables
PLAN_ROW = 200  # bytes of an image in the plan of the shards
CANDIDATE = 24  # bytes of an image that may be drawn
THUMBNAILS = (  # of the report, where most groups of copies are pairs
    report_examples.QUERIES * (1 + report_examples.NEIGHBOURS)
    + report_examples.GROUPS * 2
    + report_examples.CLUSTERS * report_examples.CLUSTER_IMAGES
)
SAMPLE_BYTES = 2600  # of a shard beside the image: JSON, tar headers, padding, index


def stage_steps(job: Job) -> dict[str, list[Step]]:
    """The steps of every stage, in order."""
    return {
        "ingest": list(_ingest(job)),
        "embed": list(_embed(job)),
        "dedup": list(_dedup(job)),
        "cluster": list(_cluster(job)),
        "retrieve": list(_retrieve(job)),
        "shards": list(_shards(job)),
        "lineage": list(_lineage(job)),
        "report": list(_report(job)),
    }


def _ingest(job: Job) -> Iterator[Step]:
    c, n, parts = job.c, job.sizes.total, job.all_parts
    packed = max(0, n - job.sizes.in_folders)
    archives = math.ceil(packed / c["images_per_archive"])
    ahead = packed * min(c["image_bytes"], READ_AHEAD)  # headers lie closer than a request reads
    yield Step(
        "scan archives",
        "workers",
        packed * (c["scan_image_s"] + c["ingest_driver_image_s"]),
        read=ahead,
        written=packed * MEMBER_ROW,
        gets=ahead / READ_AHEAD + archives / LISTED,
        puts=archives,
        items=archives,
    )
    yield driver(job, "ingest", job.sizes.in_folders, parts, archives / parts)


def _embed(job: Job) -> Iterator[Step]:
    c, n, parts, hashed = job.c, job.sizes.total, job.all_parts, job.recipe.safety.phash
    yield Step("load the models", "driver", c["load_models_s"])
    read, row = n * c["image_bytes"], 2 * (job.semantic.dim + job.copy.dim) + IMAGE_ROW
    pixels = 8 * 3 * 224**2 * 4 * job.recipe.encoder.batch
    yield Step(
        "decode and embed",
        "gpus",
        n * (c["prepare_s"] + (c["phash_s"] if hashed else 0)) + parts * c["embed_part_s"],
        flop=n * (job.semantic.flop + job.copy.flop),
        read=read,
        written=n * row,
        gets=read / READ_AHEAD + parts * TABLE,
        puts=2 * parts,
        items=parts,
        memory=job.semantic.weight_bytes + job.copy.weight_bytes + pixels,
    )
    yield Step("sort the ids", "driver", n * c["sort_image_s"], memory=24.0 * job.sizes.pool)
    if hashed:
        seconds = job.sizes.pool * hamming.comparisons(job.sizes.pool, hashed.bits)
        seconds *= c["compare_hashes_s"]
        yield Step("compare hashes", "driver", seconds, memory=30.0 * job.sizes.pool)
    yield driver(job, "embed", 2 * n, parts, (4 if hashed else 2) * IMAGES)


def _dedup(job: Job) -> Iterator[Step]:
    c, pool, n, parts = job.c, job.sizes.pool, job.sizes.total, job.all_parts
    dim, held = job.copy.dim, sum(job.sizes.holdout.values())
    yield from search(job, Ask("copies", pool, pool, dim, c["dedup_nprobe"], itself=True))
    if held:
        seekers = pool + sum(job.sizes.curated.values())
        yield from search(job, Ask("near the holdout", seekers, held, dim, c["dedup_nprobe"]))
    grouped = 0.1 * n  # groups of copies, 44 bytes each
    read = n * (c["pairs_per_image"] * PAIR + 40)
    tables = driver(job, "dedup", n, parts, 3 * IMAGES, memory=17.0 * n + 44 * grouped)
    yield replace(tables, read=read, written=20.0 * n, puts=parts)


def _cluster(job: Job) -> Iterator[Step]:
    c, r, kept, dim = job.c, job.recipe.cluster, job.kept, job.semantic.dim
    parts, row = job.parts(job.sizes.pool), 2 * job.semantic.dim
    sample = min(kept, r.k * r.sample_per_centroid or kept)
    load = row / c["load_bytes_per_s"]
    if sample < kept:
        yield Step(
            "draw the sample",
            "workers",
            kept * load + parts * 2 * c["table_s"],
            read=kept * row,
            written=sample * row,
            gets=parts * LOAD,
            puts=sample / cluster_sample.SLICE_ROWS,
            items=math.ceil(sample / cluster_sample.SLICE_ROWS),
            memory=cluster_sample.SLICE_ROWS * dim * 6,
        )
    yield from _fit_centroids(job, sample)
    flop, rate = _nearest(job)
    yield Step(
        "assign",
        "workers",
        kept * (flop / rate + c["cluster_image_s"]) + parts * c["cluster_part_s"],
        read=kept * row,
        written=kept * 16,
        gets=parts * LOAD,
        puts=parts,
        items=parts,
        memory=r.k * dim * 8 + job.recipe.resources.part_images * dim * 6,
    )
    yield driver(job, "cluster", 2 * kept, parts, 2 * TABLE)


def _nearest(job: Job) -> tuple[float, float]:
    """FLOP to find a row's nearest centroid, and their rate."""
    k, dim, c = job.recipe.cluster.k, job.semantic.dim, job.c
    if k <= groups.MANY:
        return 2.0 * dim * k, c["cells_gflops"] * 1e9
    count = math.sqrt(k)
    return 2.0 * dim * (count + c["kmeans_beam"] * k / count), c["groups_gflops"] * 1e9


def _fit_centroids(job: Job, sample: int) -> Iterator[Step]:
    """Lloyd's iterations: here if the sample fits, else by workers in at most GROUPS pieces."""
    c, r, dim = job.c, job.recipe.cluster, job.semantic.dim
    times = r.iterations * (1 + r.resample / 2)
    load = sample * 2 * dim / c["load_bytes_per_s"]
    if 4 * dim * sample <= centroids.HERE_BYTES:
        flop = 2.0 * dim * r.k * sample * times
        held = sample * (4 * dim + 150) + 40.0 * r.k * dim
        seconds = flop / (c["kmeans_gflops"] * 1e9) + times * c["kmeans_iteration_s"] + load
        yield Step("fit centroids", "node", seconds, items=math.ceil(sample / 1024), memory=held)
        return
    flop, rate = _nearest(job)
    slices = math.ceil(sample / cluster_sample.SLICE_ROWS)
    pieces = min(slices, centroids.GROUPS)
    totals = pieces * min(r.k, sample / pieces) * dim * 8
    yield Step(
        "sweep the sample",
        "workers",
        times * (sample * flop / rate + load),
        read=times * sample * 2 * dim,
        written=times * totals,
        gets=times * VECTORS * slices,
        puts=times * pieces,
        items=pieces,
        memory=30.0 * r.k * dim + cluster_sample.SLICE_ROWS * dim * 6,
    )
    yield Step(
        "merge totals",
        "driver",
        times * totals / c["load_bytes_per_s"],
        read=times * totals,
        gets=times * pieces * VECTORS,
        memory=40.0 * r.k * dim,
    )


def _retrieve(job: Job) -> Iterator[Step]:
    pool, dim = job.sizes.pool, job.semantic.dim
    asks = []
    for name, source in job.recipe.sources.curated.items():
        if one := source.sample:
            times = 1 if one.collisions == "merge" else 2
            queries = job.sizes.curated[name] * times
            asks.append(Ask(name, queries, pool, dim, job.c["retrieve_nprobe"]))
    yield from search(job, *asks)
    yield from _draws(job)
    choices = sum(share.taken for share in job.shares)
    curated = sum(job.parts(images) for images in job.sizes.curated.values())
    tables = driver(job, "retrieve", choices, 0, 0, memory=90.0 * choices)
    yield replace(tables, gets=float(IMAGES * (job.all_parts + curated)))


def _draws(job: Job) -> Iterator[Step]:
    """Hits of the sets' images, then one pass over the pool for all sets (`draws.py`)."""
    c, k, dim = job.c, job.recipe.cluster.k, job.semantic.dim
    sets = job.recipe.sources.curated
    hitting = sum(job.sizes.curated[name] for name, one in sets.items() if one.cluster)
    whole = sum(bool(one.hierarchical) for one in sets.values())
    if not hitting + whole:
        return
    if hitting:
        parts = job.parts(hitting)
        yield Step(
            "hits of clusters",
            "workers",
            hitting * (2.0 * dim * k / (c["exact_gflops"] * 1e9) + 2 * dim / c["load_bytes_per_s"]),
            read=hitting * 2.0 * dim,
            gets=parts * LOAD,
            puts=parts,
            items=parts,
            memory=k * dim * 8.0,
        )
    drawn = [draw.expected_clusters or 0 for one in sets.values() if (draw := one.cluster)]
    share = 1.0 if whole else min(1.0, sum(drawn) / k)
    parts, chunks = job.parts(job.sizes.pool), math.ceil(job.sizes.pool / draws.CHUNK_IMAGES)
    offered = job.kept * share
    yield Step(
        "candidates to draw",
        "workers",
        job.kept * c["draw_image_s"] + parts * 2 * c["table_s"],
        read=job.sizes.pool * 32.0 + job.kept * 16.0,
        written=offered * CANDIDATE,
        gets=parts * (TABLE + IMAGES),
        puts=chunks,
        items=chunks,
        together=REQUESTS,
    )
    taken = sum(share.taken for share in job.shares if share.how.startswith(("cluster", "hier")))
    yield Step(
        "draws from clusters",
        "driver",
        offered * (len(drawn) + whole) * c["draw_image_s"] + 2 * offered * c["cut_image_s"],
        read=offered * CANDIDATE,
        gets=chunks * VECTORS + whole * parts * TABLE,
        together=REQUESTS,
        memory=2.0 * CANDIDATE * taken,
    )


def _shards(job: Job) -> Iterator[Step]:
    c, chosen = job.c, job.selected
    size = c["image_bytes"]
    shards = math.ceil(chosen / job.recipe.shards.images_per_shard)
    written = chosen * (size + SAMPLE_BYTES)
    moving = written * (2 / c["hash_bytes_per_s"] + 1 / c["write_bytes_per_s"])
    yield Step(
        "write shards",
        "workers",
        chosen * c["shards_image_s"] + moving,
        read=chosen * size,
        written=written,
        gets=chosen,
        puts=shards * (1 + max(1, written / max(1, shards) / UPLOAD_PART)),
        items=shards,
        together=REQUESTS,
        memory=1e8,
    )
    yield _plan_shards(job)
    tables = driver(job, "shards", chosen, 0, 0, memory=40.0 * chosen)
    yield replace(tables, gets=float(TABLE * shards))


def _plan_shards(job: Job) -> Step:
    """Chunks of parts send the places of the selected images to plans (`shard_plan.py`)."""
    c, chosen, parts = job.c, job.selected, job.all_parts
    chunks = math.ceil(job.sizes.total / shard_plan.CHUNK_IMAGES)
    plans = math.ceil(chosen / shard_plan.PLAN_ROWS)
    blocks = chunks * plans
    return Step(
        "plan",
        "workers",
        parts * (c["shards_part_s"] + 4 * c["table_s"])
        + blocks * (c["send_block_s"] + c["receive_block_s"]),
        read=job.sizes.total * (MEMBER_ROW + IMAGE_ROW) + chosen * PLAN_ROW,
        written=2.0 * chosen * PLAN_ROW,
        gets=parts * (2 * TABLE + 2 * IMAGES) + blocks * BLOCK,
        puts=chunks + plans,
        items=chunks,
        memory=2.0 * shard_plan.PLAN_ROWS * 1000,
    )


def _lineage(job: Job) -> Iterator[Step]:
    c, n, parts = job.c, job.sizes.total, job.all_parts
    yield Step(
        "join",
        "workers",
        n * c["lineage_image_s"] + parts * c["lineage_part_s"],
        read=n * (IMAGE_ROW + 20.0),
        written=n * LINEAGE_ROW,
        gets=parts * (4 * TABLE + 2 * IMAGES),
        puts=parts,
        items=parts,
    )
    yield driver(job, "lineage", n, parts, TABLE)


def _report(job: Job) -> Iterator[Step]:
    shown = min(job.sizes.total, THUMBNAILS)
    yield Step("thumbnails", "driver", shown * job.c["thumbnail_s"], gets=float(shown))
    yield driver(job, "report", 5 * job.sizes.total, job.all_parts, 5 * TABLE)
