"""Tokens and scopes, and requests that mean harm: each over a real socket."""

import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from served import HOSTILE, Served, served

from curation.cli import main
from curation.service.auth import ServiceError, Tokens, read_tokens, require_safe
from curation.service.client import ApiError, Client
from curation.service.guard import BODY_BYTES, UPLOAD_BYTES

READ, SUBMIT = "read-token-0123456789", "submit-token-0123456789"
READS = [
    "/api/runs",
    "/api/runs/birds",
    "/api/runs/birds/events",
    "/api/runs/birds/shards",
    "/api/runs/birds/shards/000000.tar/download",
    "/api/runs/birds/images/00000000",
    "/metrics",
]


@pytest.fixture(scope="module")
def guarded(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """With tokens: one from a file, one from the environment."""
    file = tmp_path_factory.mktemp("tokens") / "tokens"
    file.write_text(f"# of this test\nsubmit {SUBMIT}\n")
    with served(runs, "--tokens", str(file), LVD_READ_TOKENS=READ) as found:
        yield found


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


@pytest.mark.parametrize("path", READS)
@pytest.mark.parametrize("headers", [{}, bearer("wrong-token-0123456789"), bearer("x" * 5000)])
def test_nothing_is_read_without_a_token(
    guarded: Served, path: str, headers: dict[str, str]
) -> None:
    answer = httpx.get(guarded.url + path, headers=headers)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.json() == {"error": "give a token: `Authorization: Bearer TOKEN`"}


@pytest.mark.parametrize("token", [READ, SUBMIT])
def test_either_token_reads(guarded: Served, token: str) -> None:
    with Client(guarded.url, token) as client:
        assert client.run("birds").state == "done"
    assert httpx.get(guarded.url + "/metrics", headers=bearer(token)).status_code == 200


def test_probes_need_no_token(guarded: Served) -> None:
    assert httpx.get(guarded.url + "/healthz").status_code == 200
    assert httpx.get(guarded.url + "/readyz").status_code == 200


def test_only_the_scope_submits(guarded: Served, service: Served) -> None:
    """404 is the answer to who may submit: there is no cluster in this test."""
    for url, token, status in (
        (guarded.url, None, 401),
        (guarded.url, "wrong-token-0123456789", 401),
        (guarded.url, READ, 403),
        (guarded.url, SUBMIT, 404),
        (service.url, None, 403),  # not without tokens either, though it reads
    ):
        with Client(url, token) as client:
            with pytest.raises(ApiError) as error:
                client.submit("name: x")
            assert error.value.status == status
            with pytest.raises(ApiError) as error:
                client.cancel("lvd-0123456789abcdef")
            assert error.value.status == status


def test_a_browser_signs_in_with_a_cookie_that_scripts_cannot_read(guarded: Served) -> None:
    with httpx.Client(base_url=guarded.url) as browser:
        assert browser.get("/").headers["location"] == "/login"
        assert browser.post("/login", data={"token": "wrong"}).status_code == 401
        answer = browser.post("/login", data={"token": READ})
        cookie = answer.headers["set-cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite=strict" in cookie
        assert browser.get("/runs/birds").status_code == 200
        assert browser.post("/logout").status_code == 303
        live = browser.get("/runs/birds", headers={"HX-Request": "true"})
        assert (live.status_code, live.headers["hx-redirect"]) == (401, "/login")
        assert browser.get("/runs/birds").status_code == 303


def test_another_site_can_not_post(guarded: Served) -> None:
    headers = bearer(SUBMIT) | {"Origin": "https://elsewhere.example"}
    answer = httpx.post(guarded.url + "/api/jobs", json={"recipe": "name: x"}, headers=headers)
    assert answer.status_code == 403
    own = bearer(SUBMIT) | {"Origin": guarded.url}
    answer = httpx.post(guarded.url + "/api/jobs", json={"recipe": "name: x"}, headers=own)
    assert answer.status_code == 404


def test_without_tokens_no_other_name_is_answered(service: Served, guarded: Served) -> None:
    """A name that leads here by DNS (rebinding) must not read what is on this machine."""
    headers = {"Host": "attacker.example"}
    assert httpx.get(service.url + "/api/runs", headers=headers).status_code == 421
    headers |= bearer(READ)
    assert httpx.get(guarded.url + "/api/runs", headers=headers).status_code == 200


def test_tokens_are_compared_by_digest() -> None:
    tokens = Tokens()
    assert not tokens
    assert tokens.scopes("") == frozenset()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("read short\n", "line 1: a token needs at least 16 characters"),
        ("\nwrite 0123456789abcdef\n", "line 2: write `read TOKEN` or `submit TOKEN`"),
        ("read\n", "line 1: write `read TOKEN` or `submit TOKEN`"),
    ],
)
def test_a_bad_file_of_tokens(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "tokens").write_text(text)
    with pytest.raises(ServiceError, match=message) as error:
        read_tokens(str(tmp_path / "tokens"))
    assert "0123456789abcdef" not in str(error.value)


def test_others_are_served_only_with_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for host in ("127.0.0.1", "localhost", "::1"):
        require_safe(host, Tokens())
    assert main(["serve", str(tmp_path), "--host", "0.0.0.0"]) == 2
    assert "--host 0.0.0.0: others can reach this, so it needs tokens" in capsys.readouterr().err


def test_starting_it_wrongly_is_one_line(
    tmp_path: Path, service: Served, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", str(tmp_path / "nope")]) == 2
    assert main(["serve", str(tmp_path), "--tokens", str(tmp_path / "none")]) == 2
    assert main(["serve", str(tmp_path), "--port", str(service.address[1])]) == 2
    assert main(["serve", str(tmp_path), "--port", "99999"]) == 2
    (tmp_path / "tokens").write_text(f"read {READ}\n")
    elsewhere = ("--host", "no.such.host.example", "--tokens", str(tmp_path / "tokens"))
    assert main(["serve", str(tmp_path), *elsewhere]) == 2
    assert main(["serve", str(tmp_path), "--ray-dashboard", "ray-head:8265"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 6
    assert "no such folder" in lines[0]
    assert "--tokens" in lines[1]
    assert "already in use; --port 0 takes one that is free" in lines[2]
    assert "--port 99999: must be 0 (a free one) to 65535" in lines[3]
    assert "--host no.such.host.example: " in lines[4]
    assert "--ray-dashboard ray-head:8265: give a URL" in lines[5]


def test_it_ends_in_silence_when_it_is_interrupted(runs: Path) -> None:
    with served(runs) as found:
        found.process.send_signal(signal.SIGINT)
        assert found.process.wait(20) == 0
        assert len(found.log.read_text().splitlines()) == 1


def raw(served: Served, *parts: bytes, pause: float = 0.0) -> bytes:
    """What comes back on a connection until the service closes it."""
    with socket.create_connection(served.address, 60) as connection:
        for part in parts:
            connection.sendall(part)
            time.sleep(pause)
        answer = b""
        while block := connection.recv(65536):
            answer += block
        return answer


TRAVERSALS = [
    "/static/../auth.py",
    "/static/%2e%2e/auth.py",
    "/static/..%2fauth.py",
    "/static//etc/passwd",
    "/api/runs/../../../../etc/passwd",
    "/api/runs/..%2f..%2fpool",
    "/api/runs/%2e%2e",
    "/api/runs/birds~..~..~pool",
    "/api/runs/birds/shards/..%2f..%2frecipe.yaml",
    "/api/runs/birds/shards/..%2frecipe.yaml/download",
    "/api/runs/birds/shards/%2fetc%2fpasswd/download",
    "/api/runs/birds/shards/000000.tar%00.tar/download",
    "/api/runs/birds/shards/000000.tar/..%2f..%2f..%2fpool%2f00001.jpg",
    "/api/runs/birds/images/..%2f..%2frecipe.yaml",
    "/api/runs/birds/stages/..%2f..%2fstatus",
    "/runs/birds/shards/..%2f..%2frecipe.yaml",
    "/api/jobs/..%2f..%2fapi%2fversion",
    "/api/jobs/raysubmit_1234567890abcdef",
]


@pytest.mark.parametrize("path", TRAVERSALS)
def test_no_path_leaves_the_runs(service: Served, path: str) -> None:
    head = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    answer = raw(service, head.encode())
    assert answer.split(b" ", 2)[1] == b"404", answer[:200]
    assert b"root:" not in answer
    assert b"sources:" not in answer
    assert b"hmac" not in answer


def test_a_hostile_key_is_shown_as_text(service: Served, client: Client) -> None:
    found = client.by_key("birds", HOSTILE).images[0]
    assert found.key == HOSTILE
    pages = [(f"/runs/birds/images/{found.id}", {}), ("/runs/birds/find", {"q": HOSTILE})]
    for path, given in pages:
        text = httpx.get(service.url + path, params=given).text
        assert "<img src=x" not in text
        assert "&lt;img src=x" in text


@pytest.mark.parametrize(
    "path", ["/", "/runs/birds", "/runs/birds/shards/000000.tar", "/login", "/nope", "/api/runs"]
)
def test_a_page_runs_no_script_but_our_own(service: Served, path: str) -> None:
    answer = httpx.get(service.url + path)
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self'" in policy
    assert "unsafe" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == "no-store"
    assert " style=" not in answer.text
    assert " onclick" not in answer.text
    assert "<script>" not in answer.text


def test_a_browser_keeps_the_script_and_asks_whether_it_is_new(service: Served) -> None:
    answer = httpx.get(f"{service.url}/static/htmx.min.js")
    assert answer.headers["cache-control"] == "public, max-age=600"
    again = {"If-None-Match": answer.headers["etag"]}
    assert httpx.get(f"{service.url}/static/htmx.min.js", headers=again).status_code == 304


def test_the_report_is_in_a_sandbox(service: Served) -> None:
    policy = httpx.get(service.url + "/runs/birds/report").headers["content-security-policy"]
    assert policy.startswith("sandbox; default-src 'none'")
    assert "script-src" not in policy


def test_what_is_too_large_is_refused(guarded: Served, service: Served) -> None:
    answer = httpx.post(
        guarded.url + "/api/jobs",
        headers=bearer(SUBMIT),
        content=b" " * (BODY_BYTES + 1),
    )
    assert answer.status_code == 413
    assert answer.json() == {"error": f"at most {BODY_BYTES:,} bytes are accepted here"}
    answer = httpx.post(
        guarded.url + "/api/jobs", headers=bearer(SUBMIT), json={"recipe": "x" * 64_001}
    )
    assert answer.status_code == 422
    url = f"{service.url}/api/runs/birds/search"
    answer = httpx.post(url, files={"image": b"\xff" * (UPLOAD_BYTES + 1)})
    assert answer.status_code == 413


def test_nothing_is_taken_from_who_has_no_token(guarded: Served) -> None:
    """Refused at once: the body, which never comes, is not waited for."""
    head = (
        b"POST /api/runs/birds/search HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999\r\n\r\n"
    )
    began = time.monotonic()
    assert raw(guarded, head).split(b" ", 2)[1] == b"401"
    assert time.monotonic() - began < 10


def test_a_body_without_a_length_is_counted(service: Served) -> None:
    head = b"POST /login HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    answer = raw(service, head, *[chunk] * 5)
    assert answer.split(b" ", 2)[1] == b"413"


@pytest.mark.slow
def test_who_is_too_slow_is_cut_off(service: Served) -> None:
    body = b"POST /login HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n"
    again = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
    sent = [(b"GET /api/runs HT",), (), (body, b"t"), (again, b"GET /heal")]
    least = (10.0, 10.0, 30.0, 5.0)  # the last: how long a connection is kept after an answer

    def cut_off(parts: tuple[bytes, ...]) -> tuple[bytes, float]:
        began = time.monotonic()
        answer = raw(service, *parts)
        return answer, time.monotonic() - began

    with ThreadPoolExecutor(len(sent)) as pool:
        answers, took = zip(*pool.map(cut_off, sent), strict=True)
    half_a_line, nothing, half_a_body, half_a_request = answers
    assert half_a_line == nothing == b""
    assert half_a_body.split(b" ", 2)[1] == b"408"
    assert half_a_request.count(b"200 OK") == 1
    for seconds, expected in zip(took, least, strict=True):
        assert expected - 0.5 < seconds < expected + 9


@pytest.mark.parametrize("path", ["/", "/login", "/runs/birds", "/runs/birds/shards"])
def test_a_page_can_be_asked_for_its_headers(service: Served, path: str) -> None:
    """As long as the page before or after: `59 s ago` may become `1 min ago` in between."""
    before, head, after = (httpx.request(m, service.url + path) for m in ("GET", "HEAD", "GET"))
    assert (head.status_code, head.content) == (200, b"")
    whole = {str(len(page.content)) for page in (before, after)}
    assert head.headers["content-length"] in whole


def test_no_token_is_in_a_log_or_an_error(guarded: Served) -> None:
    for token in (READ, SUBMIT, "wrong-token-0123456789"):
        httpx.get(f"{guarded.url}/api/runs?token={token}", headers=bearer(token))
        httpx.get(f"{guarded.url}/api/runs/{token}", headers=bearer(READ))
        answer = httpx.post(guarded.url + "/api/jobs", headers=bearer(token), json={"recipe": ""})
        assert token not in answer.text
    log = guarded.log.read_text()
    assert "token-0123456789" not in log


def test_only_what_the_manifest_names_is_a_shard(service: Served, runs: Path) -> None:
    planted = runs / "birds" / "shards" / "zzz.tar"
    planted.symlink_to("/etc/passwd")
    try:
        for name in ("zzz.tar", "manifest.json", "000000.index.parquet"):
            answer = httpx.get(f"{service.url}/api/runs/birds/shards/{name}/download")
            assert answer.status_code == 404
    finally:
        planted.unlink()


@pytest.mark.parametrize("origin", ["http://[::1", "null", "x", "http://localhost.example"])
def test_an_origin_that_is_none_of_ours_is_refused(service: Served, origin: str) -> None:
    answer = httpx.post(f"{service.url}/login", headers={"Origin": origin}, data={"token": "x"})
    assert answer.status_code == 403
