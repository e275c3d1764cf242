"""A job to be planned, and the steps that it is made of."""

import math
from dataclasses import dataclass
from typing import Literal

from curation.images.effort import Effort, copy_effort, semantic_effort
from curation.planning.composition import Share, Sizes, shares
from curation.planning.constants import Constants
from curation.recipe import Recipe
from curation.runtime.store import REQUESTS

TABLE = 1  # requests for a small Parquet file on S3: its last megabyte, which is all of it
IMAGES = 2  # for a column of a part's images, of which a megabyte is not all
VECTORS = 3  # for those of a part: the file's end, the images' numbers, the vectors
UPLOAD_PART = 16 << 20  # bytes of a request that uploads
BLOCK = 2  # for what one worker has sent to another: its place, and itself

Where = Literal["driver", "node", "workers", "gpus"]


@dataclass(frozen=True)
class Step:
    """Part of a stage. `items`: into how many pieces it can be cut.

    `where`: the driver's process, all cores of its node, the workers, or their GPUs. `seconds` are
    of one core, `flop` of the models, which go to GPUs if there are any. `gets` and `puts` are
    requests, of which a process has `together` under way, `memory` bytes of the process that does
    it.
    """

    name: str
    where: Where
    seconds: float = 0.0
    flop: float = 0.0
    read: float = 0.0
    written: float = 0.0
    gets: float = 0.0
    puts: float = 0.0
    items: int = 1
    memory: float = 0.0
    together: int = 1


@dataclass(frozen=True)
class Job:
    """A recipe with the sizes of its sources, its models' efforts, and the constants."""

    recipe: Recipe
    sizes: Sizes
    shares: list[Share]
    semantic: Effort
    copy: Effort
    c: Constants

    @classmethod
    def of(cls, recipe: Recipe, sizes: Sizes, c: Constants) -> "Job":
        """Raises EncoderError for a model that is not known."""
        efforts = semantic_effort(recipe.encoder.model), copy_effort(recipe.copy_descriptor.weights)
        return cls(recipe, sizes, shares(recipe, sizes), *efforts, c)

    def parts(self, images: int) -> int:
        """A part ends with its archive."""
        most = min(self.recipe.resources.part_images, int(self.c["images_per_archive"]))
        return max(1, math.ceil(images / most))

    @property
    def all_parts(self) -> int:
        sources = [*self.sizes.curated.values(), *self.sizes.holdout.values(), self.sizes.pool]
        return sum(self.parts(images) for images in sources if images)

    @property
    def kept(self) -> int:
        return round(self.sizes.pool * self.c["kept_share"])

    @property
    def selected(self) -> int:
        """At most: what all modes take."""
        most = self.kept + sum(self.sizes.curated.values())
        return min(sum(share.taken for share in self.shares), most)

    @property
    def remote(self) -> bool:
        return self.recipe.output.startswith("s3://")


def driver(
    job: Job, stage: str, images: float, parts: int, requests: float, memory: float = 0.0
) -> Step:
    """What the driver does itself with so many images, part by part, with `requests` for each.

    Where it only reads columns, an image costs what a row of a table does.
    """
    c, name = job.c, f"{stage}_driver"
    image = f"{name}_image_s" if f"{name}_image_s" in c.values else "table_row_s"
    seconds = c[f"{stage}_start_s"] + images * c[image] + parts * c[f"{name}_part_s"]
    return Step(
        "the driver's tables",
        "driver",
        seconds,
        gets=requests * parts,
        together=REQUESTS,
        memory=memory,
    )
