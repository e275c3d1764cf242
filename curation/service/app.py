"""The FastAPI factory: what the service is made of, and how its errors look."""

from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, RedirectResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from curation.runtime.ray_jobs import JobsError
from curation.runtime.store import StoreError
from curation.service import pages, routes
from curation.service.guard import Guard
from curation.service.jobs import BadRecipe
from curation.service.readers import Service, ServiceConfig
from curation.service.runs import NotThere
from curation.service.search import BadUpload, Busy

ABOUT = """Runs of LVD: their stages as they progress, their shards and images, and why each image
is where it is. Everything is read from what the runs wrote; the service keeps nothing."""
STATUS = {NotThere: 404, BadUpload: 422, BadRecipe: 422, Busy: 429, JobsError: 502, StoreError: 503}


class Static(StaticFiles):
    """Script and styles, which a browser keeps for a while; all else is `no-store`."""

    def file_response(self, *given: Any, **named: Any) -> Response:
        answer = super().file_response(*given, **named)
        answer.headers["cache-control"] = "public, max-age=600"
        return answer


def create_app(config: ServiceConfig) -> FastAPI:
    """The whole service: API, pages, metrics and probes."""
    app = FastAPI(title="LVD", version="1", description=ABOUT, docs_url=None, redoc_url=None)
    service = Service(config)
    app.state.service, app.state.tokens = service, config.tokens
    app.include_router(routes.probes)
    app.include_router(routes.api)
    app.include_router(pages.open_pages)
    app.include_router(pages.pages)
    app.mount("/static", Static(directory=Path(__file__).parent / "static"), "static")
    app.add_middleware(Guard, requests=service.requests, tokens=config.tokens)
    for kind in (*STATUS, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, _explain)
    return app


def _explain(request: Request, error: Exception) -> Response:
    """One line for people: JSON for programs, a page for browsers."""
    status, text = _status(error), _text(error)
    headers = getattr(error, "headers", None)
    if request.url.path.startswith(("/api", "/metrics")) or request.url.path == "/healthz":
        return JSONResponse({"error": text}, status, headers)
    if status == 401 and "hx-request" in request.headers:  # htmx would put the form into the page
        return Response(status_code=401, headers={"HX-Redirect": "/login"})
    if status == 401:
        return RedirectResponse("/login", 303)
    return pages.error_page(request, status, text)


def _status(error: Exception) -> int:
    if isinstance(error, HTTPException):
        return error.status_code
    if isinstance(error, RequestValidationError):
        return 422
    return next((status for kind, status in STATUS.items() if isinstance(error, kind)), 500)


def _text(error: Exception) -> str:
    if isinstance(error, HTTPException):
        return str(error.detail)
    if isinstance(error, RequestValidationError):
        faults: list[dict[str, Any]] = list(error.errors())
        named = [(".".join(str(x) for x in f["loc"][1:]) or "body", f["msg"]) for f in faults[:5]]
        return "; ".join(f"{where}: {what}" for where, what in named)
    if _status(error) == 500:
        return "this failed; the log of the service says why"
    return str(error)
