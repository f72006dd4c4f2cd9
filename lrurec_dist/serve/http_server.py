"""From settings to the service: put together, and run by uvicorn in this process, or by Ray Serve (`app.py`)."""

import os
import socket
from contextlib import suppress
from dataclasses import dataclass

import uvicorn

from lrurec_dist.config import Config
from lrurec_dist.config_serving import ServeConfig
from lrurec_dist.errors import ConfigError, StateVersionError
from lrurec_dist.model.process import arrange_cpu
from lrurec_dist.reporting import say
from lrurec_dist.serve.batching import BatchOptions
from lrurec_dist.serve.following import ChampionFollower, bundle_of_champion, champion_of
from lrurec_dist.serve.http_api import ApiOptions, build_api
from lrurec_dist.serve.http_door import Application, token_digest
from lrurec_dist.serve.live import LiveRecommender
from lrurec_dist.serve.service import Service
from lrurec_dist.serve.sessions import MemoryStore, SessionStore
from lrurec_dist.serve.state_files import read_states
from lrurec_dist.signals import interrupt, on_sigterm

_DRAIN_S = 10  # a request that runs when the service is stopped may take so long


@dataclass(frozen=True)
class Plan:
    """What a process needs to become the service; may be sent to it.

    Attributes:
        settings: the section `serve`.
        registry_url: whose champion is followed if no bundle is named.
        digest: `token_digest` of the token, which itself stays where it was read; None: none is asked for.
    """

    settings: ServeConfig
    registry_url: str
    digest: bytes | None


def serve(config: Config) -> None:
    """Run the service until SIGTERM or Ctrl-C, which are its ordinary end.

    Raises:
        LrurecError: as `plan_service` and `build_application`.
    """
    plan = plan_service(config)
    with suppress(KeyboardInterrupt), on_sigterm(interrupt):
        if config.serve.runner == "process":
            run_in_process(plan)
        else:
            from lrurec_dist.serve.app import run_on_ray  # so that the other runner does without Ray

            run_on_ray(plan)
    say("serve: stopped")


def plan_service(config: Config) -> Plan:
    """The plan that settings and environment make, after what can be known before a bundle is loaded was checked.

    Raises:
        ConfigError: a variable that should hold the token, or Redis's URL, is not set, or the package for Redis is missing.
        DataNotReadyError: the registry has no champion.
    """
    settings = config.serve
    digest = token_digest(_variable("token_variable", settings.token_variable)) if settings.token_variable else None
    if settings.redis_variable:
        open_store(settings)
    if not settings.bundle:
        champion_of(config.registry_url)
    return Plan(settings, config.registry_url, digest)


def build_application(plan: Plan) -> Application:
    """The service of this process, with its bundle loaded, verified and checked, and its first states in place.

    Raises:
        LrurecError: as `plan_service` and `Recommender.load`.
    """
    settings = plan.settings
    arrange_cpu()
    store = open_store(settings)
    live = LiveRecommender(settings.bundle or bundle_of_champion(plan.registry_url, champion_of(plan.registry_url)))
    service = Service(live, store, keep_events=settings.keep_events)
    say(f"serve: version {live.current.version}, {live.current.num_items:,} items")
    if settings.states:
        _start_with_states(service, settings)
    options = ApiOptions(
        max_events=settings.max_events,
        max_filter=settings.max_filter,
        max_k=settings.max_k,
        max_body_bytes=settings.max_body_bytes,
        batches=BatchOptions(size=settings.batch_size, wait_s=settings.batch_wait_ms / 1000, room=settings.max_waiting),
        digest=plan.digest,
    )
    follower = None if settings.bundle else ChampionFollower(live, plan.registry_url, poll_s=settings.poll_s)
    return build_api(service, options, follower)


def open_store(settings: ServeConfig) -> SessionStore:
    """Where sessions lie."""
    if not settings.redis_variable:
        return MemoryStore(settings.sessions)
    url = _variable("redis_variable", settings.redis_variable)
    try:
        from lrurec_dist.serve.redis_store import RedisStore
    except ModuleNotFoundError:
        raise ConfigError(
            f"serve.redis_variable={settings.redis_variable}: sessions in Redis need its package; pip install 'lrurec_dist[redis]'"
        ) from None
    return RedisStore(url, expire_s=max(1, round(settings.session_days * 86400)))


def run_in_process(plan: Plan) -> None:
    """Serve until SIGTERM or Ctrl-C; requests that run then are answered.

    Raises:
        LrurecError: as `build_application`.
        ConfigError: the port is taken.
    """
    settings = plan.settings
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        listening = socket.create_server((settings.host, settings.port), family=family, backlog=settings.max_waiting)
    except OSError as error:
        raise ConfigError(f"serve.host={settings.host}, serve.port={settings.port}: {error.strerror}; choose others") from None
    with listening:
        application = build_application(plan)
        server = uvicorn.Server(
            uvicorn.Config(
                application,
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=_DRAIN_S,
            )
        )
        say(f"serve: {address(settings, listening.getsockname()[1])}")
        server.run(sockets=[listening])


def address(settings: ServeConfig, port: int) -> str:
    """The URL of the service."""
    return f"http://{f'[{settings.host}]' if ':' in settings.host else settings.host}:{port}/"


def _start_with_states(service: Service, settings: ServeConfig) -> None:
    room = settings.sessions if not service.store.shared else 1 << 62
    try:
        stored = service.store_states(read_states(settings.states, service.live.current.version), room)
    except StateVersionError as error:
        say(f"serve: starts without states: {error}")
        return
    say(f"serve: {stored:,} states of {settings.states}; users with a session keep it")


def _variable(setting: str, name: str) -> str:
    value = os.environ.get(name, "")
    if not value:
        raise ConfigError(f"serve.{setting}={name}: the environment variable {name} is not set, or empty; set it")
    return value
