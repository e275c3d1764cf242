"""The commented recipe that `curate init` writes."""

import os

import yaml

from curation.recipe import RecipeError

TEMPLATE = """\
# An LVD recipe: curate run {path}
name: {name}
output: {output}            # a folder or s3://bucket/prefix; everything the run makes goes there
seed: 0                     # same seed, same bytes

sources:
  pool:                     # the uncurated images: folders, tars, Parquet files; local or s3://
    - {{uri: {pool}}}
    # - {{uri: list.parquet, format: urls}}   # or .txt, .csv: fetched, as robots.txt allows
  curated:                  # sets of images that show what you want
    wanted:
      uri: {like}
      retrieve:
        - as_is                       # take the set itself
        - sample: {{k: 4}}              # and the 4 nearest pool images of each of its images
        # or draw from the clusters that hold several of its images:
        # - cluster: {{per_cluster: 10000, min_queries: 4, cap: 1000000}}
        # or from the whole pool, balanced over what is in it, whatever the set's images are:
        # - hierarchical: {{levels: 3, target_size: 1000000}}
  # holdout:                # evaluation sets: nothing near them stays
  #   test: {{uri: path/to/test}}

images: {{min_side: 32}}      # smaller ones are rejected, with their reason

# Any timm ViT; weights: hub, a local file or s3://. DINOv2 used a ViT-H/16 that was never
# released; ViTs trained on ImageNet-21k are the open substitute. `lvd_demo` is built in and needs
# no download, but is small: use it to try things out.
encoder: {{model: {model}}}

# copy_descriptor: {{weights: sscd_disc_mixup.torchscript.pt}}   # left out: the built-in one
# safety: {{faces: {{detector: haar}}}}    # blurs faces in what is written; else no byte is changed
dedup: {{k: 64}}              # thresholds: those of the copy descriptor, or min_cosine: 0.6
cluster: {{k: {k}}}           # for hierarchical add resample: 10, which takes six times as long
shards: {{images_per_shard: 10000}}
"""


def write(path: str, pool: str | None, like: str | None, output: str | None) -> None:
    """Writes a starter recipe to `path`. Raises RecipeError when something is there already."""
    text = TEMPLATE.format(
        path=path,
        name="my-images",
        output=_quoted(output or "runs/my-images"),
        pool=_quoted(pool or "path/to/pool"),
        like=_quoted(like or "path/to/examples"),
        model="lvd_demo" if pool else "vit_base_patch16_224.augreg_in21k",
        k=100 if pool else 1000,
    )
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise RecipeError(f"{path}: is there already; name another file or remove it") from None
    except OSError as error:
        raise RecipeError(f"{path}: {os.strerror(error.errno or 0)}") from None


def _quoted(value: str) -> str:
    """A string as YAML would write it inside a flow mapping."""
    return yaml.safe_dump([value], default_flow_style=True, width=10_000).strip()[1:-1]
