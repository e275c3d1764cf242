"""The recipe's sections on what comes in: how URLs are fetched, and what is kept out or blurred."""

import ipaddress
import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from curation.recipe_modes import Model

DOMAIN = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*")
USER_AGENT = re.compile(r"[A-Za-z_-]+[ -~]*")  # RFC 9309: the letters before `/` are its product


def _domain(value: str) -> str:
    if not DOMAIN.fullmatch(value.lower()):
        raise ValueError("must be a domain such as example.com")
    return value.lower()


def _network(value: str) -> str:
    try:
        return str(ipaddress.ip_network(value))
    except ValueError as error:
        raise ValueError(f"must be a network such as 10.1.0.0/16 ({error})") from None


def _user_agent(value: str) -> str:
    if not USER_AGENT.fullmatch(value):
        raise ValueError("must be like lvd/0.1 (+https://example.com/crawler), a product first")
    return value


Domain = Annotated[str, AfterValidator(_domain)]
Network = Annotated[str, AfterValidator(_network)]
UserAgent = Annotated[str, AfterValidator(_user_agent)]


class Fetch(Model):
    """How URLs are fetched. Each host gets `host_connections` at a time, `host_delay_s` apart.

    `deny`: domains that are never asked. `allow_networks`: private networks that may be reached,
    such as 10.1.0.0/16; all others are refused. A worker has `connections` open at most. `robots`
    means robots.txt and X-Robots-Tag.
    """

    user_agent: UserAgent = "lvd/0.1"
    robots: Literal["respect", "ignore"] = "respect"
    deny: tuple[Domain, ...] = ()
    allow_networks: tuple[Network, ...] = ()
    connections: int = Field(64, ge=1, le=4096)
    host_connections: int = Field(2, ge=1)
    host_delay_s: float = Field(0.1, ge=0)
    timeout_s: float = Field(30.0, gt=0)
    retries: int = Field(2, ge=0, le=10)


class SafetyFilter(Model):
    """A classifier of sensitive images; left out: none. `report` adds scores, `drop` rejects.

    `weights`: a TorchScript or ONNX file by uri, or those of the timm `model`. `unsafe` are the
    numbers of the unsafe classes, whose score must stay below `threshold`.
    """

    weights: str
    model: str | None = None
    mode: Literal["report", "drop"] = "report"
    threshold: float = Field(0.5, ge=0, le=1)
    unsafe: tuple[Annotated[int, Field(ge=0)], ...] = Field((1,), min_length=1)
    activation: Literal["softmax", "sigmoid", "none"] = "softmax"
    size: int = Field(224, ge=8, le=2048)
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)


class Faces(Model):
    """Blurs faces in what is written; left out: no image is changed.

    `detector`: `haar`, or an ONNX file of UltraFace's form (outputs `scores` and `boxes`).
    """

    detector: str = "haar"
    min_score: float = Field(0.7, gt=0, le=1)


class PerceptualHash(Model):
    """Finds pool images whose pHashes differ in at most `bits` of 64; left out: none are made.

    `report` tells them in the lineage, `drop` keeps the best of them. Hashes meet by chance as the
    square of the pool: above some ten million images take 2 bits.
    """

    mode: Literal["report", "drop"] = "report"
    bits: int = Field(4, ge=0, le=10)


class Safety(Model):
    """What is done about sensitive images, faces and copies: nothing, unless asked for."""

    filter: SafetyFilter | None = None
    faces: Faces | None = None
    phash: PerceptualHash | None = None
