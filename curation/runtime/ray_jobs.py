"""Jobs on a Ray cluster over its HTTP API (the dashboard's port), which needs no Ray here."""

import os
from pathlib import Path
from typing import Any

import httpx

TIMEOUT_S = 20.0
LOG_BYTES = 1 << 20


class JobsError(Exception):
    """The cluster does not answer, or refuses: one line for people."""


class NoJob(JobsError):
    """There is no such job on the cluster."""


class RayJobs:
    """Submits jobs and asks about them. `dashboard` is a URL, as http://ray-head:8265."""

    def __init__(self, dashboard: str) -> None:
        self._url = dashboard.rstrip("/")

    def submit(
        self, job: str, entrypoint: str, variables: dict[str, str], metadata: dict[str, str]
    ) -> None:
        """Starts `entrypoint` (a line of shell) under the name `job`. Raises JobsError."""
        given = {"submission_id": job, "entrypoint": entrypoint, "metadata": metadata}
        self._call("POST", "", {**given, "runtime_env": {"env_vars": variables}})

    def describe(self, job: str) -> dict[str, Any]:
        """`status`, `message`, `start_time` and `end_time` (ms), `metadata`. Raises NoJob."""
        return self._call("GET", job)

    def logs(self, job: str) -> str:
        """The end of what it printed so far. Raises NoJob."""
        return str(self._call("GET", f"{job}/logs").get("logs", ""))[-LOG_BYTES:]

    def stop(self, job: str) -> bool:
        """Asks a job to end; False when it had ended. Raises NoJob."""
        return bool(self._call("POST", f"{job}/stop").get("stopped"))

    def _call(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        try:
            answer = httpx.request(
                method,
                f"{self._url}/api/jobs/{path}",
                json=body,
                headers=_authorization(),
                timeout=TIMEOUT_S,
            )
        except httpx.HTTPError as error:
            raise JobsError(
                f"the Ray cluster does not answer ({type(error).__name__}); is its dashboard up?"
            ) from None
        if answer.status_code == httpx.codes.NOT_FOUND:
            raise NoJob("the Ray cluster knows no such job")
        if answer.is_error:
            why = " ".join(answer.text.split())[:200]
            raise JobsError(f"the Ray cluster refused ({answer.status_code}): {why}")
        found: dict[str, Any] = answer.json()
        return found


def _authorization() -> dict[str, str]:
    """Ray's own token, from where its command line takes it."""
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        return {}
    token = os.environ.get("RAY_AUTH_TOKEN", "")
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser()
    if not token and path.exists():
        token = path.read_text().strip()
    return {"Authorization": f"Bearer {token}"} if token else {}
