"""One URL at a time against a real server: what is taken, what is refused, and what is asked."""

import asyncio
import datetime
import socket
import ssl
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from loopback import Site, answer, dropped, flood, silent, trickle

from curation.web import fetcher, hosts
from curation.web.fetcher import FetchConfig, Fetcher, Refused

IMAGE = b"\xff\xd8\xff" + b"image" * 100
CONFIG = FetchConfig(
    user_agent="lvd/0.1 (test)",
    robots=True,
    deny=(),
    allow_networks=("127.0.0.1/32",),
    connections=32,
    host_connections=32,
    host_delay_s=0.0,
    timeout_s=1.0,
    retries=0,
    max_bytes=100_000,
)


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetcher, "BACKOFF_S", 0.01)


def fetched(cfg: FetchConfig, *urls: str) -> list[bytes | str]:
    """The bytes of each URL, or the reason why there are none; all at the same time."""

    async def one(web: Fetcher, url: str) -> bytes | str:
        try:
            found = await web.fetch(url)
        except Refused as refused:
            return str(refused)
        with found.body as body:
            return body.read()

    async def every() -> list[bytes | str]:
        async with Fetcher(cfg) as web:
            return await asyncio.gather(*(one(web, url) for url in urls))

    return asyncio.run(every())


def word(outcome: bytes | str) -> str:
    assert isinstance(outcome, str)
    return outcome.split()[0]


def redirect(place: str, status: str = "302 Found") -> bytes:
    return answer(status=status, Location=place)


BAD: dict[str, tuple[Any, str]] = {
    "/missing": (answer(status="404 Not Found"), "url_404"),
    "/gone": (answer(status="410 Gone"), "url_410"),
    "/forbidden": (answer(status="403 Forbidden"), "url_403"),
    "/broken": (answer(status="500 Oops"), "url_500"),
    "/html": (answer(b"<html>", kind="text/html; charset=utf-8"), "url_not_an_image"),
    "/declared": (answer(b"x").replace(b"Length: 1", b"Length: 200000"), "url_too_large"),
    "/flood": (flood, "url_too_large"),
    "/trickle": (trickle, "url_timeout"),
    "/silent": (silent, "url_timeout"),
    "/dropped": (dropped, "url_cut_short"),
    "/empty": (answer(), "url_empty"),
    "/zipped": (answer(IMAGE, Content_Encoding="gzip"), "url_encoded"),
    "/garbage": (b"this is no HTTP\r\n\r\n", "url_bad_answer"),
    "/noai": (answer(IMAGE, X_Robots_Tag="noarchive, NoAI"), "url_noindex"),
    "/ours": (answer(IMAGE, X_Robots_Tag="lvd: noindex"), "url_noindex"),
    "/loop": (redirect("/loop"), "url_redirects"),
    "/nowhere": (answer(status="302 Found"), "url_302"),
    "/file": (redirect("file:///etc/passwd"), "url_invalid"),
    "/inside": (redirect("http://169.254.169.254/latest/meta-data"), "url_private_address"),
    "/localhost": (redirect("http://[::1]:1/"), "url_private_address"),
    "/number": (redirect("http://2130706434/"), "url_invalid"),
    "/denied": (redirect("http://images.evil.example/x.jpg"), "url_denied"),
}


@pytest.mark.parametrize("path", BAD)
def test_a_bad_answer_is_refused_with_its_reason(path: str) -> None:
    page, reason = BAD[path]
    with Site({path: page}) as site:
        began = time.monotonic()
        (outcome,) = fetched(replace(CONFIG, deny=("evil.example",)), site.url(path))
        assert word(outcome) == reason, outcome
        assert time.monotonic() - began < 3
        assert site.asked["/robots.txt"] == 1


@pytest.mark.parametrize(
    "url",
    ["ftp://x/y", "http://", "nonsense", "http://x:99999/", "//x", "http://[::/", "http://127.2/"],
)
def test_what_is_no_http_url_is_told(url: str) -> None:
    assert word(fetched(CONFIG, url)[0]) == "url_invalid"


def test_good_answers_and_redirects_give_the_bytes() -> None:
    pages: dict[str, Any] = {
        "/a.jpg": answer(IMAGE),
        "/raw": answer(IMAGE, kind="application/octet-stream"),
        "/other": answer(IMAGE, X_Robots_Tag="googlebot: noindex"),
        "/moved": redirect("/a.jpg", "301 Moved"),
    }
    with Site(pages) as site:
        found = fetched(CONFIG, *(site.url(path) for path in pages), site.url("/a.jpg#part"))
        assert found == [IMAGE] * 5
        assert site.asked["/robots.txt"] == 1


@pytest.mark.parametrize("host", ["127.0.0.2", "localhost", "[::ffff:127.0.0.2]"])
def test_a_private_address_is_never_connected_to(host: str) -> None:
    with Site({"/x": answer(IMAGE)}, host="127.0.0.2") as site:
        url = f"http://{host}:{site.port}/x"
        refused = fetched(replace(CONFIG, allow_networks=()), url)
        assert word(refused[0]) == "url_private_address", refused
        assert site.connections == 0


def test_a_redirect_inside_is_not_followed() -> None:
    with Site({"/secret": answer(IMAGE)}, host="127.0.0.2") as inside:
        pages = {
            "/a": redirect(inside.url("/secret")),
            "/b": redirect("/a"),
            "/robots.txt": redirect(inside.url("/robots.txt")),
        }
        with Site({**pages}) as site:
            for cfg in (CONFIG, replace(CONFIG, robots=False)):
                outcomes = fetched(cfg, site.url("/a"), site.url("/b"))
                assert {word(outcome) for outcome in outcomes} == {"url_private_address"}
        assert inside.connections == 0


def test_a_name_that_changes_its_address_is_judged_by_where_it_leads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A name server that says 127.0.0.1 for robots.txt and 127.0.0.2 for the image."""
    answers = iter(["127.0.0.1", "127.0.0.2"])
    resolve = socket.getaddrinfo

    def rebinding(host: Any, *rest: Any, **named: Any) -> Any:
        return resolve(next(answers) if host == "images.example" else host, *rest, **named)

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    monkeypatch.setattr(fetcher, "DNS_CACHE_S", 0)
    close = {"Connection": "close"}
    with (
        Site({"/robots.txt": answer(b"", **close)}) as site,
        Site({"/x": answer(IMAGE)}, host="127.0.0.2", port=site.port) as inside,
    ):
        (outcome,) = fetched(CONFIG, f"http://images.example:{site.port}/x")
        assert word(outcome) == "url_private_address"
        assert site.asked == {"/robots.txt": 1}
        assert inside.connections == 0


def test_robots_txt_is_obeyed_and_asked_once() -> None:
    rules = (
        b"User-agent: lvd\nDisallow: /private\nAllow: /private/open\n\nUser-agent: *\nDisallow: /"
    )
    pages: dict[str, Any] = {
        "/robots.txt": answer(rules, kind="text/plain"),
        "/private/x": answer(IMAGE),
        "/private/open/x": answer(IMAGE),
        "/x": answer(IMAGE),
        "/to": redirect("/private/x"),
    }
    with Site(pages) as site:
        urls = [site.url(p) for p in ("/private/x", "/private/open/x", "/x", "/to")]
        found = fetched(CONFIG, *urls)
        assert found[1:3] == [IMAGE, IMAGE]
        assert [word(found[0]), word(found[3])] == ["url_robots", "url_robots"]
        assert site.asked["/robots.txt"] == 1
        assert site.asked["/private/x"] == 0
        assert fetched(replace(CONFIG, robots=False), *urls) == [IMAGE] * 4


@pytest.mark.parametrize(
    ("page", "reason"),
    [
        (answer(status="503 Later"), "url_robots_failed"),
        (silent, "url_timeout"),
        (answer(b"User-agent: *\nDisallow: /\n" + b"#" * 5_000_000), "url_robots"),
    ],
)
def test_a_robots_txt_that_fails_forbids_all(page: Any, reason: str) -> None:
    with Site({"/robots.txt": page, "/x": answer(IMAGE)}) as site:
        assert word(fetched(CONFIG, site.url("/x"))[0]) == reason
        assert site.asked["/x"] == 0


def test_a_site_that_asks_for_a_pause_gets_it() -> None:
    rules = answer(b"User-agent: *\nCrawl-delay: 0.2\n")
    with Site({"/robots.txt": rules, "/x": answer(IMAGE)}) as site:
        assert fetched(CONFIG, *[site.url("/x")] * 4) == [IMAGE] * 4
        starts = sorted(site.began[1:])
        assert min(b - a for a, b in pairwise(starts)) > 0.15


def test_a_host_is_asked_a_few_at_a_time_and_with_pauses() -> None:
    async def slow(writer: asyncio.StreamWriter, request: dict[str, str]) -> None:
        await asyncio.sleep(0.05)
        writer.write(answer(IMAGE))
        await writer.drain()

    with Site({"/x": slow}) as site:
        cfg = replace(CONFIG, host_connections=3, robots=False, timeout_s=5)
        assert fetched(cfg, *[site.url("/x")] * 12) == [IMAGE] * 12
        assert site.most_open == 3
    with Site({"/x": slow}) as site:
        began = time.monotonic()
        fetched(replace(CONFIG, host_delay_s=0.1, robots=False), *[site.url("/x")] * 6)
        assert time.monotonic() - began > 0.5
        assert site.most_open == 1


def test_passing_faults_are_tried_again_and_lasting_ones_not() -> None:
    turns = {"/later": 0}

    async def later(writer: asyncio.StreamWriter, request: dict[str, str]) -> None:
        turns["/later"] += 1
        writer.write(answer(IMAGE) if turns["/later"] == 3 else answer(status="503 Later"))
        await writer.drain()

    with Site({"/later": later}) as site:
        cfg = replace(CONFIG, retries=2)
        found = fetched(cfg, site.url("/later"), site.url("/missing"))
        assert found[0] == IMAGE
        assert word(found[1]) == "url_404"
        assert (site.asked["/later"], site.asked["/missing"]) == (3, 1)


def test_a_retry_waits_as_long_as_it_is_told() -> None:
    with Site({"/x": answer(status="429 Slow down", Retry_After="1")}) as site:
        began = time.monotonic()
        assert word(fetched(replace(CONFIG, retries=1), site.url("/x"))[0]) == "url_429"
        assert time.monotonic() - began > 1
        assert site.asked["/x"] == 2


def test_a_host_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "GIVE_UP", 3)
    with Site({"/x": silent}) as site:
        cfg = replace(CONFIG, robots=False, host_connections=1, timeout_s=0.2)
        found = [word(outcome) for outcome in fetched(cfg, *[site.url("/x")] * 20)]
        assert site.asked["/x"] <= 4
        assert set(found) == {"url_timeout", "url_host_dead"}


def test_a_server_that_is_not_there_and_a_name_that_is_not_known() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        outcomes = fetched(CONFIG, f"http://127.0.0.1:{port}/x", "http://no-such-host.invalid/x")
    assert [word(outcome) for outcome in outcomes] == ["url_unreachable", "url_no_such_host"]


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    day = datetime.timedelta(days=1)
    made = x509.CertificateBuilder(name, name, key.public_key(), 1, now - day, now + day)
    made = made.add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), False)
    made = made.add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
    signed = made.sign(key, hashes.SHA256())
    pem = serialization.Encoding.PEM
    secret = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path = tmp_path / "server.pem"
    path.write_bytes(secret + signed.public_bytes(pem))
    return path


def test_https_is_verified(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with Site({"/x": answer(IMAGE)}, tls=context) as site:
        url = f"https://localhost:{site.port}/x"
        assert word(fetched(CONFIG, url)[0]) == "url_tls"
        assert not site.asked
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert fetched(CONFIG, url) == [IMAGE]
        assert word(fetched(CONFIG, f"https://127.0.0.1:{site.port}/x")[0]) == "url_tls"
