"""The web page: the same answers as the API's, rendered here. htmx asks again for what changes."""

import time
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, Depends, File, Form, Query, Request, UploadFile
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from jinja2 import Environment, PackageLoader, StrictUndefined

from curation.runtime.readable import readable_bytes, readable_seconds
from curation.schema import REPORT_HTML
from curation.service import models
from curation.service.auth import COOKIE, Tokens, reads
from curation.service.charts import Chart, chart
from curation.service.lineage import ID_DIGITS
from curation.service.routes import Readers
from curation.service.runs import NotThere
from curation.service.search import BadUpload

ROWS = 20
TILES = 60
COOKIE_S = 12 * 3600
REPORT_POLICY = "sandbox; default-src 'none'; img-src data:; style-src 'unsafe-inline'"
CHARTS = {
    "loss": "Loss",
    "dino_global": "DINO, global crops",
    "dino_local": "DINO, local crops",
    "ibot": "iBOT",
    "koleo": "KoLeo",
    "knn_accuracy": "kNN accuracy",
    "images_per_s": "Images a second",
    "data_wait": "Time waiting for data",
    "feature_rank": "Feature rank",
    "teacher_entropy": "Teacher entropy",
    "lr": "Learning rate",
}
PERCENT = ("knn_accuracy", "data_wait")
READ = ["GET", "HEAD"]

pages = APIRouter(include_in_schema=False, dependencies=[Depends(reads)])
open_pages = APIRouter(include_in_schema=False)


def _ago(seconds: float | None) -> str:
    """`3 min ago`."""
    if seconds is None:
        return "–"
    gone = max(time.time() - seconds, 0)
    for name, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if gone >= size:
            return f"{gone / size:.0f} {name} ago"
    return "just now" if gone < 10 else f"{gone:.0f} s ago"


def _rate(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}/s" if value >= 10 else f"{value:.1f}/s"


def _about(seconds: float) -> str:
    """A time that is only estimated: no tenths."""
    return readable_seconds(seconds) if seconds >= 60 else f"{seconds:.0f} s"


def _environment() -> Environment:
    """Keys and metadata are hostile text: everything is escaped."""
    found = Environment(
        loader=PackageLoader("curation.service", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {"count": "{:,}".format, "cosine": "{:.3f}".format, "ago": _ago}
    found.filters |= {
        "size": readable_bytes,
        "time": readable_seconds,
        "rate": _rate,
        "about": _about,
    }
    return found


_templates = _environment()


def _page(request: Request, template: str, status: int = 200, **given: Any) -> HTMLResponse:
    signed_in = COOKIE in request.cookies
    text = _templates.get_template(template).render(signed_in=signed_in, **given)
    return HTMLResponse(text, status)


def error_page(request: Request, status: int, text: str) -> HTMLResponse:
    """One line for people, and the way back."""
    return _page(request, "error.html.j2", status, text=text)


@open_pages.api_route("/login", methods=READ)
def login_form(request: Request) -> Response:
    return _page(request, "login.html.j2", wrong=False)


@open_pages.post("/login")
def login(request: Request, token: Annotated[str, Form(max_length=1000)] = "") -> Response:
    """Keeps the token in a cookie that no script reads and no other site sends."""
    tokens: Tokens = request.app.state.tokens
    if not tokens.scopes(token):
        return _page(request, "login.html.j2", 401, wrong=True)
    answer = RedirectResponse("/", 303)
    forwarded = request.headers.get("x-forwarded-proto", request.url.scheme)
    answer.set_cookie(
        COOKIE,
        token,
        max_age=COOKIE_S,
        httponly=True,
        samesite="strict",
        secure=forwarded == "https",
    )
    return answer


@open_pages.post("/logout")
def logout() -> Response:
    answer = RedirectResponse("/login", 303)
    answer.delete_cookie(COOKIE, httponly=True, samesite="strict")
    return answer


@pages.api_route("/", methods=READ)
def runs(request: Request, readers: Readers) -> Response:
    found = readers.catalog.summaries()
    live = "hx-request" in request.headers
    return _page(request, "_runs.html.j2" if live else "runs.html.j2", runs=found)


@pages.api_route("/runs/{run}", methods=READ)
def one_run(request: Request, run: str, readers: Readers) -> Response:
    """The whole page, or for htmx its part that changes."""
    live = "hx-request" in request.headers
    if readers.catalog.kind(run) == "pretraining":
        found = readers.catalog.pretraining(run)
        template = "_pretraining.html.j2" if live else "pretraining.html.j2"
        curves = found.curves()
        return _page(request, template, run=found.summary(), curves=curves, charts=_charts(curves))
    told = readers.catalog.run(run).describe()
    if live:
        return _page(request, "_run.html.j2", run=told)
    shards = readers.shards.page(readers.catalog.run(run), 0, ROWS)
    recipe = readers.catalog.run(run).recipe()
    return _page(request, "run.html.j2", run=told, shards=shards, rows=ROWS, recipe=recipe)


def _charts(curves: models.Curves) -> list[Chart]:
    points = {**curves.losses, **curves.series}
    return [
        chart(title, points[name], name in PERCENT)
        for name, title in CHARTS.items()
        if points.get(name)
    ]


@pages.api_route("/runs/{run}/shards", methods=READ)
def shards(
    request: Request, run: str, readers: Readers, offset: Annotated[int, Query(ge=0)] = 0
) -> Response:
    """A page of the table of shards; without htmx as a page of its own."""
    found = readers.shards.page(readers.catalog.run(run), offset, ROWS)
    live = "hx-request" in request.headers
    template = "_shards.html.j2" if live else "shards.html.j2"
    return _page(request, template, run=readers.catalog.run(run).summary(), shards=found, rows=ROWS)


@pages.api_route("/runs/{run}/shards/{shard}", methods=READ)
def one_shard(
    request: Request,
    run: str,
    shard: str,
    readers: Readers,
    offset: Annotated[int, Query(ge=0)] = 0,
) -> Response:
    found = readers.shards.samples(readers.catalog.run(run), shard, offset, TILES)
    return _page(
        request,
        "shard.html.j2",
        run=readers.catalog.run(run).summary(),
        page=found,
        tiles=TILES,
    )


@pages.api_route("/runs/{run}/images/{id}", methods=READ)
def story(request: Request, run: str, id: str, readers: Readers) -> Response:
    found = readers.lineage.story(readers.catalog.run(run), id)
    return _page(
        request,
        "image.html.j2",
        run=readers.catalog.run(run).summary(),
        story=found,
        image=found.images[0],
        other=_other(found.images[0]),
    )


@pages.api_route("/runs/{run}/images/{id}/nearest", methods=READ)
def nearest(request: Request, run: str, id: str, readers: Readers) -> Response:
    found = readers.catalog.run(run)
    image = readers.lineage.first(found, id)
    answer = readers.searcher.neighbours(found, image, TILES // 2)
    return _page(
        request,
        "search.html.j2",
        run=found.summary(),
        name=image.key,
        answer=answer,
        fault="",
    )


def _other(image: models.Image) -> str | None:
    """The id that a reason names: the image that stays instead, or one of an evaluation set."""
    words = image.reason.split()
    named = len(words) > 1 and words[0] in ("duplicate_of", "near_holdout") and len(words[1]) == 64
    return words[1] if named else None


@pages.api_route("/runs/{run}/find", methods=READ)
def find(
    request: Request,
    run: str,
    readers: Readers,
    q: Annotated[str, Query(max_length=1000)] = "",
    start: Annotated[int, Query(ge=0)] = 0,
) -> Response:
    """By id at once, else by key."""
    found, wanted = readers.catalog.run(run), q.strip()
    digits = set(wanted.lower()) <= set("0123456789abcdef")
    if len(wanted) >= ID_DIGITS and digits and not start:
        try:
            first = readers.lineage.first(found, wanted)
            return RedirectResponse(f"/runs/{quote(found.name)}/images/{first.id}", 303)
        except NotThere:
            pass  # it may still be a key
    answer = readers.lineage.by_key(found, wanted, start) if wanted else None
    return _page(request, "find.html.j2", run=found.summary(), wanted=wanted, found=answer)


@pages.post("/runs/{run}/search")
def search(
    request: Request, run: str, readers: Readers, image: Annotated[UploadFile, File()]
) -> Response:
    found = readers.catalog.run(run)
    try:
        answer, fault = readers.searcher.nearest(found, image.file.read(), TILES // 2), ""
    except BadUpload as error:
        answer, fault = None, str(error)
    return _page(
        request,
        "search.html.j2",
        200 if answer else 422,
        run=found.summary(),
        name=image.filename or "",
        answer=answer,
        fault=fault,
    )


@pages.api_route("/runs/{run}/report", methods=READ)
def report(run: str, readers: Readers) -> Response:
    """The run's report as it was written, in a sandbox: it has no script, and may have none."""
    found = readers.catalog.run(run)
    found.report("report")
    policy = {"Content-Security-Policy": REPORT_POLICY}
    return HTMLResponse(found.store.read(REPORT_HTML), headers=policy)
