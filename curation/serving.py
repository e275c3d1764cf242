"""`curate serve`: lends the service what lies above it, the encoders and the recipe."""

import contextlib
import errno
import functools
import math
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import yaml
from PIL import Image

from curation.images.decode import BadImage, Limits, decode
from curation.images.errors import EncoderError
from curation.recipe import RecipeError, location, parse
from curation.runtime.executor import one_thread
from curation.runtime.store import StoreError, read_uri
from curation.service.app import create_app
from curation.service.auth import ServiceError, read_tokens, require_safe
from curation.service.jobs import BadRecipe
from curation.service.readers import ServiceConfig
from curation.service.runs import NotThere
from curation.service.search import BadUpload, Vector
from curation.service.server import Server, bind

if TYPE_CHECKING:  # torch takes seconds and half a gigabyte: what has no searches needs none
    from curation.images.encoders import VectorModel
    from curation.images.faces import FaceBlur

LOCALHOST = "127.0.0.1"
PORT = 8000
MODELS = 2  # encoders kept for searches
SHOWN = Limits(min_side=1, max_pixels=64_000_000, max_bytes=64 << 20, max_aspect=math.inf)


@dataclass(frozen=True)
class ServeOptions:
    """What `curate serve` is given."""

    runs: str
    host: str = LOCALHOST
    port: int = PORT
    tokens: str | None = None
    ray_dashboard: str | None = None


def serve(options: ServeOptions) -> None:
    """Answers until it is interrupted. Raises ServiceError or StoreError before it begins."""
    with contextlib.suppress(KeyboardInterrupt):  # that is how it is ended
        _ready(options).run()


@contextlib.contextmanager
def beside(run: str, port: int) -> Iterator[None]:
    """Serves one run on this machine while the block runs."""
    server = _ready(ServeOptions(run, port=port))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.stop()
        thread.join()


def _ready(options: ServeOptions) -> Server:
    tokens = read_tokens(options.tokens)
    require_safe(options.host, tokens)
    if "://" not in options.runs and not Path(options.runs).expanduser().is_dir():
        raise ServiceError(f"{options.runs}: no such folder; give the one that holds your runs")
    if options.ray_dashboard and not options.ray_dashboard.startswith(("http://", "https://")):
        raise ServiceError(
            f"--ray-dashboard {options.ray_dashboard}: give a URL, as http://ray-head:8265"
        )
    config = ServiceConfig(options.runs, embed, show, check_recipe, tokens, options.ray_dashboard)
    app = create_app(config)
    app.state.service.catalog.all()  # a wrong bucket is told now, not by the first request
    taken = _bound(options.host, options.port)
    host = options.host.strip("[]")
    where = f"[{host}]" if ":" in host else host
    print(f"serving {options.runs} on http://{where}:{taken.getsockname()[1]}", flush=True)
    return Server(app, taken)


def _bound(host: str, port: int) -> socket.socket:
    if not 0 <= port < 2**16:
        raise ServiceError(f"--port {port}: must be 0 (a free one) to 65535")
    try:
        return bind(host, port)
    except OSError as error:
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            text = f"--port {port}: {error.strerror}; --port 0 takes one that is free"
        else:
            text = f"--host {host}: {error.strerror}; give an address of this machine, as 0.0.0.0"
        raise ServiceError(text) from None


def embed(recipe: str, data: bytes) -> Vector:
    """An image's vector (D,) by the encoder of a run's recipe. Raises BadUpload or NotThere."""
    try:
        model, limits = _model(recipe)
    except (RecipeError, EncoderError, StoreError) as error:
        raise NotThere(f"the run's encoder can't be loaded here: {error}") from None
    try:
        pixels = decode(data, limits).pixels
    except BadImage as error:
        raise BadUpload(f"the upload can't be used: {error}") from None
    row: Vector = model(np.stack([model.prepare(pixels)]))[0]
    return row


@functools.lru_cache(MODELS)
def _model(recipe: str) -> "tuple[VectorModel, Limits]":
    from curation.images.encoders import load_semantic
    from curation.pipeline import embed_config

    one_thread()
    cfg = embed_config(parse(recipe, "recipe.yaml", []))
    weights = None if cfg.weights in ("hub", "builtin") else read_uri(cfg.weights)
    return load_semantic(cfg.model, weights, cfg.precision), cfg.limits


def show(recipe: str, data: bytes) -> Image.Image:
    """An input image as it may be shown: with faces blurred where its run does. Raises NotThere."""
    try:
        image, blur = decode(data, SHOWN).pixels, _blur(recipe)
    except BadImage as error:
        raise NotThere(f"no picture can be made of it: {error}") from None
    except (RecipeError, EncoderError, StoreError) as error:
        raise NotThere(f"its faces can't be blurred here, so it is not shown: {error}") from None
    return image if blur is None else blur.image(image)[0]


@functools.lru_cache(MODELS)
def _blur(recipe: str) -> "FaceBlur | None":
    parsed = parse(recipe, "recipe.yaml", [])
    if parsed.safety.faces is None:
        return None
    from curation.pipeline import faces_config
    from curation.stages.shards import load_faces

    return load_faces(faces_config(parsed))


def check_recipe(text: str, root: str) -> str:
    """A submitted recipe's output, which must lie below `root`. Raises BadRecipe."""
    try:
        if _repeats(text):
            raise BadRecipe("recipe: anchors and aliases (&, *) are not accepted here")
        recipe = parse(text, "recipe", [])
    except (RecipeError, RecursionError) as error:
        raise BadRecipe(" ".join(str(error).split())) from None
    root, output = location(root), location(recipe.output)
    if (
        not recipe.output.startswith(("/", "s3://"))
        or not output.startswith(root)
        or output == root
    ):
        raise BadRecipe(f"output: {recipe.output}: it must lie below {root}, to be shown here")
    return recipe.output


def _repeats(text: str) -> bool:
    """Whether YAML has aliases, of which a few lines make more than memory holds."""
    try:
        return any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text))
    except yaml.YAMLError:
        return False  # the parser of recipes tells what is wrong
