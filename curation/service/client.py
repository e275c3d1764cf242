"""The same calls from Python.

with Client("http://localhost:8000", token="…") as lvd:
    for run in lvd.runs():
        print(run.run, run.state)
"""

import json
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel

from curation.service import models

M = TypeVar("M", bound=BaseModel)
BLOCK_BYTES = 1 << 20
PAGE = 1000


class ApiError(Exception):
    """The service refused: its status and its one line."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"{status}: {text}")
        self.status = status


class Client:
    """Every call raises ApiError when the service refuses, httpx.HTTPError when it's not there."""

    def __init__(self, url: str, token: str | None = None, timeout_s: float = 30.0) -> None:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._http = httpx.Client(
            base_url=url, headers=headers, timeout=timeout_s, follow_redirects=False
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._http.close()

    def runs(self) -> list[models.RunSummary]:
        return self._get(models.Runs, "/api/runs").runs

    def run(self, run: str) -> models.Run:
        return self._get(models.Run, _path("runs", run))

    def stage(self, run: str, stage: str) -> models.Stage:
        return self._get(models.Stage, _path("runs", run, "stages", stage))

    def pretraining(self, run: str) -> models.Curves:
        return self._get(models.Curves, _path("runs", run, "pretraining"))

    def events(self, run: str, after: str = "") -> Iterator[tuple[str, Any]]:
        """(`stages` or `event`, its content) as they come, without an end."""
        headers = {"Last-Event-ID": after} if after else {}
        path, forever = _path("runs", run, "events"), httpx.Timeout(30.0, read=60.0)
        with self._http.stream("GET", path, headers=headers, timeout=forever) as answer:
            _check(answer)
            kind = ""
            for line in answer.iter_lines():
                name, _, value = line.partition(": ")
                if name == "event":
                    kind = value
                elif name == "data":
                    yield kind, json.loads(value)

    def shards(self, run: str) -> Iterator[models.Shard]:
        """All shards of a run, a page at a time."""
        offset = 0
        while True:
            page = self.shard_page(run, offset, PAGE)
            yield from page.shards
            offset += len(page.shards)
            if not page.shards or offset >= page.total:
                return

    def shard_page(self, run: str, offset: int = 0, limit: int = 100) -> models.Shards:
        return self._get(models.Shards, _path("runs", run, "shards"), offset=offset, limit=limit)

    def samples(
        self, run: str, shard: str, offset: int = 0, limit: int = 100
    ) -> models.ShardSamples:
        path = _path("runs", run, "shards", shard)
        return self._get(models.ShardSamples, path, offset=offset, limit=limit)

    def download(self, run: str, shard: str, to: Path) -> int:
        """Writes a shard to a file; returns its bytes. The token goes to the service alone."""
        answer = self._http.head(_path("runs", run, "shards", shard, "download"))
        if answer.is_redirect:
            with httpx.stream("GET", answer.headers["location"], timeout=60.0) as stored:
                return _save(stored, to)
        path = _path("runs", run, "shards", shard, "download")
        with self._http.stream("GET", path) as served:
            return _save(served, to)

    def image(self, run: str, shard: str, key: str, thumbnail: int | None = None) -> bytes:
        """The original bytes, or a WebP of at most `thumbnail` pixels a side."""
        given = {} if thumbnail is None else {"thumbnail": thumbnail}
        return _check(
            self._http.get(_path("runs", run, "shards", shard, key), params=given)
        ).content

    def story(self, run: str, id: str) -> models.Story:
        return self._get(models.Story, _path("runs", run, "images", id))

    def nearest(self, run: str, id: str, k: int = 12) -> models.SearchAnswer:
        return self._get(models.SearchAnswer, _path("runs", run, "images", id, "nearest"), k=k)

    def by_key(self, run: str, key: str, start: int = 0) -> models.Found:
        return self._get(models.Found, _path("runs", run, "images"), key=key, start=start)

    def search(self, run: str, image: bytes, k: int = 12) -> models.SearchAnswer:
        path = _path("runs", run, "search")
        answer = self._http.post(path, params={"k": k}, files={"image": ("image", image)})
        return models.SearchAnswer.model_validate(_check(answer).json())

    def submit(self, recipe: str) -> models.Job:
        """Runs a recipe (YAML) on the cluster; the token needs the scope `submit`."""
        return self._post("/api/jobs", {"recipe": recipe})

    def job(self, job: str) -> models.Job:
        return self._get(models.Job, _path("jobs", job))

    def job_logs(self, job: str) -> str:
        return self._get(models.JobLogs, _path("jobs", job, "logs")).logs

    def cancel(self, job: str) -> models.Job:
        return self._post(_path("jobs", job, "cancel"), None)

    def _get(self, model: type[M], path: str, **params: Any) -> M:
        return model.model_validate(_check(self._http.get(path, params=params)).json())

    def _post(self, path: str, body: Any) -> models.Job:
        return models.Job.model_validate(_check(self._http.post(path, json=body)).json())


def _path(*parts: str) -> str:
    return "/api/" + "/".join(quote(part, safe="") for part in parts)


def _check(answer: httpx.Response) -> httpx.Response:
    if answer.is_error:
        answer.read()
        try:
            text = str(answer.json()["error"])
        except (ValueError, KeyError, TypeError):
            text = answer.text[:200]
        raise ApiError(answer.status_code, text)
    return answer


def _save(answer: httpx.Response, to: Path) -> int:
    _check(answer)
    with to.open("wb") as file:
        return sum(file.write(block) for block in answer.iter_bytes(BLOCK_BYTES))
