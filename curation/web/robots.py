"""What a site forbids: robots.txt (RFC 9309) and the X-Robots-Tag of an answer."""

from collections.abc import Iterable

from protego import Protego

MAX_BYTES = 512_000  # RFC 9309, section 2.5: at least 500 KiB must be read
FORBIDDING = frozenset(("noindex", "none", "noimageindex", "noai", "noimageai"))


class Rules:
    """One site's robots.txt, for one user agent."""

    def __init__(self, text: str, user_agent: str) -> None:
        self._parsed, self._agent = Protego.parse(text), product(user_agent)

    def allow(self, url: str) -> bool:
        return bool(self._parsed.can_fetch(url, self._agent))

    @property
    def pause_s(self) -> float:
        """The pause between requests that the site asks for, 0 if it doesn't."""
        return float(self._parsed.crawl_delay(self._agent) or 0)


def product(user_agent: str) -> str:
    """The name that robots.txt knows an agent by: `lvd` of `lvd/0.1 (+https://…)`."""
    return user_agent.split("/")[0].split()[0]


def forbidden_by(tags: Iterable[str], user_agent: str) -> str | None:
    """The directive of X-Robots-Tag headers that forbids the use of an image, or None.

    `agent: directive` holds for that agent only, and so do the directives after it.
    """
    for tag in tags:
        for_us = True
        for item in tag.lower().split(","):
            agent, colon, directive = item.partition(":")
            if colon and agent.strip() != "unavailable_after":
                for_us = agent.strip() in ("*", product(user_agent).lower())
            directive = (directive if colon else item).strip()
            if for_us and directive in FORBIDDING:
                return directive
    return None
