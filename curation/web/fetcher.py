"""Fetches images by URL from sites that can't be trusted, and says why when it doesn't."""

import asyncio
import hashlib
import ssl
import tempfile
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass
from ipaddress import ip_network
from types import TracebackType
from typing import IO, Any, Self, TypeVar, cast

import aiohttp
from yarl import URL

from curation.web import robots
from curation.web.addresses import PrivateAddress, guarded_socket
from curation.web.hosts import Hosts, is_within

REDIRECTS = frozenset((301, 302, 303, 307, 308))
MAX_REDIRECTS = 5
AGAIN_STATUS = frozenset((408, 425, 429, 500, 502, 503, 504))
BACKOFF_S = 1.0  # before the second attempt; twice as long before each further one
LONGEST_WAIT_S = 60.0  # what a Retry-After may ask for
IN_MEMORY_BYTES = 1 << 20  # of one answer; the rest goes to a temporary file
BLOCK = 1 << 16
DNS_CACHE_S = 300
RESOLVERS = 32  # threads that wait for name servers
SITES = 10_000  # whose robots.txt is remembered
TYPES = ("image/", "application/octet-stream", "binary/octet-stream")


@dataclass(frozen=True)
class FetchConfig:
    """Which URLs may be fetched, and how hard and how politely it is tried."""

    user_agent: str
    robots: bool
    deny: tuple[str, ...]
    allow_networks: tuple[str, ...]
    connections: int
    host_connections: int
    host_delay_s: float
    timeout_s: float
    retries: int
    max_bytes: int


class Refused(Exception):
    """No image; the first word of the message is a stable reason.

    `again`: it may go away by itself. `dead`: there was no answer at all.
    """

    def __init__(
        self, why: str, again: bool = False, dead: bool = False, wait_s: float = 0
    ) -> None:
        super().__init__(why)
        self.again, self.dead, self.wait_s = again, dead, wait_s


class DiskError(OSError):
    """The temporary files' disk failed: no fault of the URL."""


@dataclass
class Answer:
    """The bytes of a good answer, and the URL that gave them at last."""

    url: str
    body: IO[bytes]
    size: int
    sha256: str


T = TypeVar("T")


class Fetcher:
    """An async context: one connection pool, and what is known of each host."""

    def __init__(self, cfg: FetchConfig) -> None:
        self._cfg = cfg
        self._hosts = Hosts(cfg.host_connections, cfg.host_delay_s)
        self._slots = asyncio.Semaphore(cfg.connections)
        self._sites: OrderedDict[URL, asyncio.Future[robots.Rules | Refused]] = OrderedDict()
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(RESOLVERS))
        networks = [ip_network(text) for text in self._cfg.allow_networks]
        connector = aiohttp.TCPConnector(
            limit=0,  # counted here, without those that wait for their host's turn
            ssl=ssl.create_default_context(),
            socket_factory=guarded_socket(networks),
            ttl_dns_cache=DNS_CACHE_S,
        )
        session = aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,  # images aren't compressed again but by bombs
            headers={"User-Agent": self._cfg.user_agent, "Accept-Encoding": "identity"},
            timeout=aiohttp.ClientTimeout(total=None),
        )
        self._session = await self._stack.enter_async_context(session)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        await self._stack.aclose()

    async def fetch(self, text: str) -> Answer:
        """The answer of a URL. Raises Refused, or DiskError."""
        url = _parsed(text)
        return await self._tried(lambda: self._follow(url, self._image, self._cfg.robots))

    async def _tried(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """Attempts with back-off, while what went wrong may go away."""
        for number in range(self._cfg.retries + 1):
            try:
                return await attempt()
            except Refused as refused:
                if not refused.again or number == self._cfg.retries:
                    raise
                await asyncio.sleep(max(BACKOFF_S * 2**number, refused.wait_s))
        raise AssertionError("unreachable")

    async def _follow(
        self,
        url: URL,
        read: Callable[[aiohttp.ClientResponse], Awaitable[T]],
        ask_robots: bool,
    ) -> T:
        """What `read` makes of the answer at the end of the redirects, each of them checked."""
        for _ in range(MAX_REDIRECTS + 1):
            pause = await self._admit(url, ask_robots)
            found = await self._request(url, read, pause)
            if not isinstance(found, URL):
                return found
            url = found
        raise Refused(f"url_redirects more than {MAX_REDIRECTS}")

    async def _admit(self, url: URL, ask_robots: bool) -> float:
        """The pause its host asks for. Raises Refused for what may not be fetched."""
        if is_within(url.host or "", self._cfg.deny):
            raise Refused(f"url_denied the recipe denies {url.host}")
        if not ask_robots:
            return 0.0
        rules = await self._rules(url.origin())
        if isinstance(rules, Refused):
            raise Refused(str(rules))
        if not rules.allow(str(url)):
            raise Refused("url_robots forbidden by robots.txt")
        return rules.pause_s

    async def _request(
        self, url: URL, read: Callable[[aiohttp.ClientResponse], Awaitable[T]], pause_s: float
    ) -> T | URL:
        host = url.host or ""
        async with self._hosts.turn(host, pause_s), self._slots:
            if self._hosts.dead(host):
                raise Refused("url_host_dead it gave no answer many times in a row")
            try:
                async with (
                    asyncio.timeout(self._cfg.timeout_s),
                    self._session.get(url, allow_redirects=False) as response,
                ):
                    self._hosts.answered(host)
                    if response.status in REDIRECTS:
                        return _target(url, response)
                    return await read(response)
            except (Refused, DiskError):
                raise
            except Exception as error:  # the web's boundary: each URL gets its reason
                refused = _reason(error, self._cfg.timeout_s)
                if refused.dead:
                    self._hosts.failed(host)
                raise refused from None

    async def _image(self, response: aiohttp.ClientResponse) -> Answer:
        _check_status(response)
        headers = response.headers
        tags = headers.getall("X-Robots-Tag", [])
        if self._cfg.robots and (word := robots.forbidden_by(tags, self._cfg.user_agent)):
            raise Refused(f"url_noindex X-Robots-Tag: {word}")
        kind = headers.get("Content-Type", TYPES[1]).lower()
        if not kind.startswith(TYPES):
            raise Refused(f"url_not_an_image its type is {kind[:60]}")
        if (coding := headers.get("Content-Encoding", "identity").lower()) != "identity":
            raise Refused(f"url_encoded its bytes are packed by {coding[:20]}")
        if (response.content_length or 0) > self._cfg.max_bytes:
            raise self._too_large()
        body = tempfile.SpooledTemporaryFile(IN_MEMORY_BYTES)  # noqa: SIM115 (given to the caller)
        try:
            digest, size = await self._read_into(body, response)
        except BaseException:
            body.close()
            raise
        return Answer(str(response.url), cast(IO[bytes], body), size, digest)

    async def _read_into(self, body: Any, response: aiohttp.ClientResponse) -> tuple[str, int]:
        digest, size = hashlib.sha256(), 0
        async for block in response.content.iter_chunked(BLOCK):
            size += len(block)
            if size > self._cfg.max_bytes:
                raise self._too_large()
            digest.update(block)
            try:
                body.write(block)
            except OSError as error:
                raise DiskError(*error.args) from None
        if not size:
            raise Refused("url_empty the answer has no bytes")
        body.seek(0)
        return digest.hexdigest(), size

    def _too_large(self) -> Refused:
        return Refused(f"url_too_large more than {self._cfg.max_bytes} bytes")

    async def _rules(self, site: URL) -> robots.Rules | Refused:
        """A site's robots.txt, asked for once; why there is none is remembered as well."""
        if site not in self._sites:
            self._sites[site] = asyncio.ensure_future(self._ask(site))
            if len(self._sites) > SITES:
                self._sites.popitem(last=False)
        self._sites.move_to_end(site)
        return await self._sites[site]

    async def _ask(self, site: URL) -> robots.Rules | Refused:
        url = site.with_path("/robots.txt")
        try:
            text = await self._tried(lambda: self._follow(url, self._text, False))
        except Refused as refused:
            return refused
        return robots.Rules(text, self._cfg.user_agent)

    async def _text(self, response: aiohttp.ClientResponse) -> str:
        """RFC 9309: a site without a robots.txt allows all, one that fails allows nothing."""
        if 400 <= response.status < 500 and response.status not in AGAIN_STATUS:
            return ""
        if response.status != 200:
            raise Refused(f"url_robots_failed robots.txt answers {response.status}", again=True)
        text = bytearray()
        async for block in response.content.iter_chunked(BLOCK):
            text += block
            if len(text) > robots.MAX_BYTES:
                break
        return text[: robots.MAX_BYTES].decode("utf-8", "replace")


def _parsed(text: str) -> URL:
    try:
        url = URL(text)
        if url.scheme not in ("http", "https") or not url.host:
            raise ValueError("it must be http:// or https:// and a host")
        url.port  # noqa: B018 (raises where it is no number)
    except ValueError as error:
        raise Refused(f"url_invalid {' '.join(str(error).split())[:120]}") from None
    return url.with_user(None).with_fragment(None)


def _target(url: URL, response: aiohttp.ClientResponse) -> URL:
    place = response.headers.get("Location")
    if not place:
        raise Refused(f"url_{response.status} a redirect to nowhere")
    try:
        return _parsed(str(url.join(URL(place))))
    except ValueError:
        raise Refused("url_invalid it redirects to something that is no URL") from None


def _check_status(response: aiohttp.ClientResponse) -> None:
    if response.status == 200:
        return
    asked = response.headers.get("Retry-After", "")
    wait = min(float(asked), LONGEST_WAIT_S) if asked.isascii() and asked.isdigit() else 0.0
    again = response.status in AGAIN_STATUS
    raise Refused(
        f"url_{response.status} {response.reason or ''}"[:120].strip(), again, wait_s=wait
    )


def _reason(error: Exception, timeout_s: float) -> Refused:
    text = " ".join(str(error).split())[:160]
    match error:
        case TimeoutError():
            return Refused(f"url_timeout no whole answer within {timeout_s:g} s", True, dead=True)
        case aiohttp.ClientConnectorDNSError():
            return Refused("url_no_such_host its name can't be resolved", True, dead=True)
        case aiohttp.ClientSSLError() | ssl.SSLError():
            return Refused(f"url_tls {text}")
        case aiohttp.ClientConnectorError() if _is_private(error.os_error):
            return Refused("url_private_address it leads into a private network")
        case aiohttp.InvalidURL():
            return Refused(f"url_invalid {text}")
        case aiohttp.ClientPayloadError():
            return Refused("url_cut_short the answer ended before its end", True)
        case aiohttp.ClientResponseError() | ValueError():
            return Refused(f"url_bad_answer {text}")
        case aiohttp.ClientError() | OSError():
            return Refused(f"url_unreachable {text}", True, dead=True)
    return Refused(f"url_failed {type(error).__name__}: {text}", True)


def _is_private(error: OSError) -> bool:
    """Several refused addresses come as one error that only quotes them."""
    return isinstance(error, PrivateAddress) or "is not a public address" in str(error)
