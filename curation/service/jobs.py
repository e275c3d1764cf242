"""Recipes sent to a Ray cluster. A job belongs to this service by its name alone: no state here."""

import re
import secrets
from collections.abc import Callable
from typing import Any

from curation.runtime.ray_jobs import NoJob, RayJobs
from curation.service import models
from curation.service.runs import NotThere

NAME = re.compile(r"lvd-[0-9a-f]{16}")
# The recipe travels as a variable: no text of a request is ever part of a command.
ENTRYPOINT = "printenv LVD_RECIPE | python -m curation run -"

# (recipe as YAML, root that its output must lie below) -> its output. Raises BadRecipe.
CheckRecipe = Callable[[str, str], str]


class BadRecipe(Exception):
    """A recipe with faults: lists them."""


class Jobs:
    """Checks recipes before a cluster sees them."""

    def __init__(self, ray: RayJobs | None, check: CheckRecipe, root: str) -> None:
        self._ray, self._check, self._root = ray, check, root

    def submit(self, recipe: str) -> models.Job:
        """Raises BadRecipe, NotThere without a cluster, JobsError."""
        ray = self._cluster()
        output = self._check(recipe, self._root)
        name = f"lvd-{secrets.token_hex(8)}"
        ray.submit(name, ENTRYPOINT, {"LVD_RECIPE": recipe}, {"output": output})
        return models.Job(job=name, state="PENDING", output=output)

    def describe(self, job: str) -> models.Job:
        """Raises NotThere."""
        found = self._ask(job, lambda ray: ray.describe(job))
        return models.Job(
            job=job,
            state=found["status"],
            message=found.get("message") or "",
            output=(found.get("metadata") or {}).get("output"),
            started=_seconds(found.get("start_time")),
            ended=_seconds(found.get("end_time")),
        )

    def logs(self, job: str) -> models.JobLogs:
        """Raises NotThere."""
        return models.JobLogs(job=job, logs=self._ask(job, lambda ray: ray.logs(job)))

    def cancel(self, job: str) -> models.Job:
        """Asks the job to stop. Raises NotThere."""
        self._ask(job, lambda ray: ray.stop(job))
        return self.describe(job)

    def _cluster(self) -> RayJobs:
        if self._ray is None:
            raise NotThere("no Ray cluster is known here; `curate serve --ray-dashboard URL`")
        return self._ray

    def _ask(self, job: str, call: Callable[[RayJobs], Any]) -> Any:
        """Only jobs of this service's naming are asked for: others are none of its business."""
        ray = self._cluster()
        if NAME.fullmatch(job) is None:
            raise NotThere(f"no job '{job[:40]}'")
        try:
            return call(ray)
        except NoJob:
            raise NotThere(f"no job '{job}'") from None


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000
