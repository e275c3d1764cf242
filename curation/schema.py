"""The tables that stages exchange: one Arrow schema each, and where it lies in a run.

Every input image has a number: its position over all parts in order (`parts.base` + row). Tables
refer to images by number (int64), people by `id`, the sha256 of the image's bytes.
"""

import pyarrow as pa

# Raise a stage's number when what it writes changes: its outputs are then made again.
VERSIONS = {
    "ingest": 1,
    "embed": 3,
    "dedup": 6,
    "cluster": 2,
    "retrieve": 6,
    "shards": 1,
    "lineage": 3,
    "report": 4,
}

# Where readers of a run find what they need, besides each stage's `done.json`.
RECIPE_FILE = "recipe.yaml"
PARTS_TABLE = "ingest/parts.parquet"
SHARDS_MANIFEST = "shards/manifest.json"
REPORT_JSON = "report/report.json"
REPORT_HTML = "report/report.html"

ID = pa.binary(32)  # sha256 of the image's bytes

EXTRA = pa.struct([("ext", pa.string()), ("offset", pa.int64()), ("size", pa.int64())])

# ingest: one row an input image, found but not yet read. `locator` is the exact name under the
# source (bytes: names need not be UTF-8), `key` its readable form. Archive members have an offset
# (-1: the whole file); in Parquet the offset is the row number. `fault` tells why a member can't
# be read at all.
MEMBERS = pa.schema(
    [
        ("uri", pa.string()),
        ("key", pa.string()),
        ("locator", pa.binary()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("version", pa.string()),
        ("extras", pa.list_(EXTRA)),
        ("fault", pa.string()),
    ]
)

# ingest: a list of URLs; `columns` is the rest of the list's row as JSON.
URLS = pa.schema([("url", pa.string()), ("columns", pa.string())])

# ingest: the work list. A part is one row group of a members table. `source` "" is the run itself,
# which keeps what was fetched.
PARTS = pa.schema(
    [
        ("part", pa.int32()),
        ("role", pa.string()),
        ("set", pa.string()),
        ("source", pa.string()),
        ("kind", pa.string()),
        ("table", pa.string()),
        ("row_group", pa.int32()),
        ("rows", pa.int64()),
        ("base", pa.int64()),
        ("fingerprint", pa.string()),
    ]
)

# embed: one row a member, in the same order. `fault` is null for an image that can be used,
# `unsafe` the score of the safety filter, if there is one, `phash` the perceptual hash, if it is
# asked for and the image has one. By `checksum`, xxh3 of the bytes, `shards` tells in a tenth of
# the time of sha256 whether an image is still the one that was embedded.
IMAGES = pa.schema(
    [
        ("id", ID),
        ("key", pa.string()),
        ("uri", pa.string()),
        ("ext", pa.string()),
        ("bytes", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("fault", pa.string()),
        ("unsafe", pa.float32()),
        ("phash", pa.uint64()),
        ("checksum", pa.uint64()),
    ]
)

# embed: images that have the same bytes as an earlier pool image.
EXACT = pa.schema([("image", pa.int64()), ("first", pa.int64())])

# embed: pool images whose perceptual hash is `bits` from that of a better one, `kept`.
PHASH = pa.schema(
    [("image", pa.int64()), ("kept", pa.int64()), ("kept_id", ID), ("bits", pa.int32())]
)

# dedup: one row an image. `other` is the id of the image that stays instead, or of a holdout image.
DECISIONS = pa.schema(
    [
        ("decision", pa.string()),
        ("component", pa.int64()),
        ("other", ID),
        ("cosine", pa.float32()),
    ]
)

NEIGHBOURS = pa.schema([("query", pa.int64()), ("image", pa.int64()), ("cosine", pa.float32())])

# cluster: one row a kept image.
ASSIGNMENTS = pa.schema([("image", pa.int64()), ("cluster", pa.int32()), ("cosine", pa.float32())])

# retrieve: why an image is in the set; an image may have several reasons.
RETRIEVED_BY = pa.struct(
    [
        ("set", pa.string()),
        ("query_id", pa.string()),
        ("how", pa.string()),
        ("cosine", pa.float32()),
    ]
)
SELECTED = pa.schema([("image", pa.int64()), ("id", ID), ("retrieved_by", pa.list_(RETRIEVED_BY))])

# retrieve: the clusters of clusters of a set's `hierarchical` mode, level 1 those of `cluster`.
# `parent` is a cluster of the level above (null at the top), `images` the kept pool images below,
# `quota` how many of them are drawn: the quotas of a level add up to the draw.
HIERARCHY = pa.schema(
    [
        ("level", pa.int32()),
        ("cluster", pa.int32()),
        ("parent", pa.int32()),
        ("images", pa.int64()),
        ("quota", pa.int64()),
    ]
)

# retrieve: chosen images whose bytes are already selected under another number.
SAME_BYTES = pa.schema([("image", pa.int64()), ("first", pa.int64())])

# shards: everything a shard's writer needs, in the order of the shard; a row group a shard.
PLAN = pa.schema(
    [
        ("image", pa.int64()),
        ("id", ID),
        ("checksum", pa.uint64()),
        ("ext", pa.string()),
        ("role", pa.string()),
        ("set", pa.string()),
        ("key", pa.string()),
        ("source", pa.string()),
        ("locator", pa.binary()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("extras", pa.list_(EXTRA)),
        ("metadata", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("retrieved_by", pa.list_(RETRIEVED_BY)),
    ]
)
PLACEMENT = pa.schema([("image", pa.int64()), ("shard", pa.string())])

# shards: selected rows of a Parquet part, copied to a file that can be read at random.
SPOOL_INDEX = pa.schema(
    [("image", pa.int64()), ("offset", pa.int64()), ("size", pa.int64()), ("metadata", pa.string())]
)

# shards: a seekable index beside each tar, one row a member file.
SHARD_INDEX = pa.schema(
    [
        ("key", pa.string()),
        ("member", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("sha256", pa.string()),
    ]
)

# shards: images whose faces were blurred, and how many; all others have their original bytes.
FACES = pa.schema([("image", pa.int64()), ("faces", pa.int32())])

# lineage: the whole story, one row an input image.
LINEAGE = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.string()),
        ("set", pa.string()),
        ("uri", pa.string()),
        ("key", pa.string()),
        ("decision", pa.string()),
        ("reason", pa.string()),
        ("component", pa.int64()),
        ("retrieved_by", pa.list_(RETRIEVED_BY)),
        ("shard", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("bytes", pa.int64()),
        ("image", pa.int64()),
        ("unsafe", pa.float32()),
        ("faces_blurred", pa.int32()),
        ("phash_duplicate_of", pa.string()),
        ("phash_bits", pa.int32()),
    ]
)


# lineage: image numbers by a key, sorted by (key, image), a file for some millions of images: by
# `id` and `query` (the first 8 bytes of a sha256, big-endian), and by `component`.
LOOKUP = pa.schema([("key", pa.uint64()), ("image", pa.int64())])
LOOKUPS = ("id", "component", "query")


def lineage_path(part: int) -> str:
    """The lineage of the images of one part."""
    return f"lineage/parts/{part:06d}.parquet"


def lookup_folder(lookup: str) -> str:
    """The tables of one of LOOKUPS."""
    return f"lineage/by_{lookup}"


def id_prefix(hexadecimal: str) -> int:
    """The key of an id in LOOKUP: its first 16 hexadecimal digits as a number."""
    return int(hexadecimal[:16], 16)


def vectors(semantic_dim: int, copy_dim: int) -> pa.Schema:
    """The embeddings table of a part: unit-norm fp16 rows as fixed-size binary.

    `row` is the row of the part's images table. dtype and dimension stand in each field's metadata.
    """

    def field(name: str, dim: int) -> pa.Field:
        meta = {"dtype": "float16", "dim": str(dim)}
        return pa.field(name, pa.binary(2 * dim), nullable=False, metadata=meta)

    return pa.schema(
        [pa.field("row", pa.int32()), field("semantic", semantic_dim), field("copy", copy_dim)]
    )
