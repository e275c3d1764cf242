"""The runs below one root, found by what they wrote."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

from curation.runtime.store import Store, StoreError, open_store
from curation.schema import RECIPE_FILE
from curation.service import models
from curation.service.cache import Cache, Fresh
from curation.service.pretraining import METRICS, Pretraining
from curation.service.runs import STAGES, NotThere, Run

DEPTH = 2  # runs lie in the root, or in a folder of it
MAX_RUNS = 10_000
FIND_S = 10.0
RUNS = ThreadPoolExecutor(16, "read-runs")


class Catalog:
    """The runs of one root. A request names one of these; no request's text becomes a path."""

    def __init__(self, root: str) -> None:
        self.root = open_store(root)
        self._found = Fresh(self._find, FIND_S)
        self._opened: Cache[Run | Pretraining] = Cache(MAX_RUNS, lambda _: 1)

    def _find(self) -> dict[str, tuple[str, str]]:
        """Name -> (path, kind)."""
        found: dict[str, tuple[str, str]] = {}
        for path, kind in islice(_walk(self.root, "", 0), MAX_RUNS):
            name = path.replace("/", "~") or self.root.uri.rstrip("/").rpartition("/")[2]
            while name in found:  # a folder `a~b` beside a run `a/b`
                name += "~"
            found[name] = (path, kind)
        return found

    def _open(self, name: str, path: str, kind: str) -> Run | Pretraining:
        def make() -> Run | Pretraining:
            store = open_store(self.root.locate(path))
            return Run(name, path, store) if kind == "curation" else Pretraining(name, path, store)

        return self._opened.get((name, path, kind), make)

    def all(self) -> list[Run | Pretraining]:
        """Every run, of curation and of pretraining."""
        return [self._open(name, *found) for name, found in self._found.get().items()]

    def summaries(self) -> list[models.RunSummary]:
        """All runs, the one with the latest sign of life first; a damaged one hides no other."""
        found = list(RUNS.map(_summary, self.all()))
        return sorted(found, key=lambda run: -(run.updated or 0))

    def run(self, name: str) -> "Run":
        """Raises NotThere."""
        run = self._named(name)
        if not isinstance(run, Run):
            raise NotThere(f"'{name}' is a run of pretraining; it has no stages and shards")
        return run

    def pretraining(self, name: str) -> Pretraining:
        """Raises NotThere."""
        run = self._named(name)
        if isinstance(run, Run):
            raise NotThere(f"'{name}' is a run of curation; it has no losses")
        return run

    def kind(self, name: str) -> str:
        """`curation` or `pretraining`. Raises NotThere."""
        return "curation" if isinstance(self._named(name), Run) else "pretraining"

    def _named(self, name: str) -> Run | Pretraining:
        found = self._found.get().get(name)
        if found is None:
            raise NotThere(f"no run '{name[:80]}'; /api/runs lists them")
        return self._open(name, *found)


def _summary(run: Run | Pretraining) -> models.RunSummary:
    try:
        return run.summary()
    except StoreError as error:
        text = str(error)
        return models.RunSummary(
            run=run.name, path=run.path, kind=run.kind, state="unreadable", message=text
        )


def _walk(root: Store, path: str, depth: int) -> Iterator[tuple[str, str]]:
    """(path, kind) of every run in `path`; the folders of a run's stages aren't looked into."""

    def inside(name: str) -> str:
        return f"{path}/{name}" if path else name

    has_recipe = root.exists(inside(RECIPE_FILE))
    folders = root.folders(path) if has_recipe or depth < DEPTH else ()
    is_run = has_recipe and "status" in folders  # and not a recipe that lies beside the runs
    if is_run:
        yield path, "curation"
    elif root.exists(inside(METRICS)):
        yield path, "pretraining"
    if depth < DEPTH:
        own = (*STAGES, "events", "status") if is_run else ()
        below = [inside(name) for name in folders if name[0] != "." and name not in own]
        each = RUNS.map if depth == 0 else map  # on S3 each takes some requests
        for found in each(lambda folder: list(_walk(root, folder, depth + 1)), below):
            yield from found
