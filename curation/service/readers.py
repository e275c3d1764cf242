"""What the service is made of: one reader of each kind, and what it is lent."""

from dataclasses import dataclass, field

from curation.runtime.ray_jobs import RayJobs
from curation.service.auth import Tokens
from curation.service.catalog import Catalog
from curation.service.jobs import CheckRecipe, Jobs
from curation.service.lineage import LineageReader
from curation.service.metrics import Requests, RunGauges
from curation.service.pictures import Pictures, Show
from curation.service.search import Embed, Searcher
from curation.service.shards import ShardReader


@dataclass(frozen=True)
class ServiceConfig:
    """What a service reads (a folder or s3:// prefix of runs), and what it is lent.

    `embed`, `show` and `check_recipe` need the encoders, the decoder and the recipe, which lie
    above the service: who starts it hands them in. `ray_dashboard` None: no jobs.
    """

    root: str
    embed: Embed
    show: Show
    check_recipe: CheckRecipe
    tokens: Tokens = field(default_factory=Tokens)
    ray_dashboard: str | None = None


class Service:
    """The readers behind the routes, one of each."""

    def __init__(self, config: ServiceConfig) -> None:
        self.catalog = Catalog(config.root)
        self.shards = ShardReader()
        self.lineage = LineageReader()
        self.pictures = Pictures(self.shards, config.show)
        self.searcher = Searcher(self.lineage, config.embed)
        ray = RayJobs(config.ray_dashboard) if config.ray_dashboard else None
        self.jobs = Jobs(ray, config.check_recipe, config.root)
        self.requests = Requests()
        self.requests.registry.register(RunGauges(self.catalog))
