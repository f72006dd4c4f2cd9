"""The service over HTTP, as a plain ASGI application: whatever runs ASGI runs it."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Query, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException

from lrurec_dist import __version__
from lrurec_dist.errors import RequestError, TryAgainError
from lrurec_dist.serve.batching import Batcher, BatchOptions
from lrurec_dist.serve.following import ChampionFollower
from lrurec_dist.serve.http_door import Application, Door
from lrurec_dist.serve.http_models import (
    EventsAnswer,
    EventsRequest,
    FoundItem,
    FoundItems,
    Item,
    Problem,
    RecommendAnswer,
    RecommendRequest,
    StateView,
    Version,
)
from lrurec_dist.serve.item_keys import Key
from lrurec_dist.serve.item_search import find_items
from lrurec_dist.serve.service import Answer, Ask, Service
from lrurec_dist.serve.service_metrics import ServiceMetrics

_PAGE = Path(__file__).with_name("page.html")
# The page is one file: nothing else may be loaded, and nobody else be asked.
_PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; connect-src 'self'; frame-ancestors 'none'"
_FOUND_ITEMS = 50  # of a search, at most


@dataclass(frozen=True, kw_only=True)
class ApiOptions:
    """What a request may ask for, and how requests are gathered.

    Attributes:
        max_events, max_filter, max_k: of one request: events, keys in `exclude` and in `allow`, items.
        max_body_bytes: of a request.
        batches: as `Batcher`.
        digest: `token_digest` of the token; None: none is asked for.
    """

    max_events: int
    max_filter: int
    max_k: int
    max_body_bytes: int
    batches: BatchOptions
    digest: bytes | None = None


def build_api(service: Service, options: ApiOptions, follower: ChampionFollower | None = None) -> Application:
    """The ASGI application; it follows the champion as long as its lifespan lasts."""
    batcher: Batcher[Ask, Answer] = Batcher(service.answer, options.batches)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        if follower is not None:
            follower.start()
        yield
        if follower is not None:
            follower.stop()
        await batcher.close()

    api = FastAPI(
        title="lrurec_dist",
        version=__version__,
        description="Recommendations from the registry's champion. Item keys are those of the log.",
        docs_url=None,  # would load its scripts from elsewhere
        redoc_url=None,
        lifespan=lifespan,
        dependencies=[Security(HTTPBearer(auto_error=False))] if options.digest else [],  # for the description; Door checks it
        responses={status: {"model": Problem} for status in (401, 413, 422, 503) if status != 401 or options.digest},
    )
    metrics = _metrics(service, batcher, follower)
    _add_answers(api, service, batcher, options)
    _add_facts(api, service, metrics)
    _add_problems(api)
    return Door(api, digest=options.digest, max_body_bytes=options.max_body_bytes, seen=metrics.seen)


def _add_answers(api: FastAPI, service: Service, batcher: Batcher[Ask, Answer], options: ApiOptions) -> None:
    @api.post("/recommend")
    async def recommend(request: RecommendRequest) -> RecommendAnswer:
        """The k best items after a user's events, best first."""
        if request.user is None and "events" not in request.model_fields_set:
            raise RequestError("neither user nor events: name a user, or give a history ([] for none)")
        _check_length("events", request.events, "max_events", options.max_events)
        _check_length("exclude", request.exclude, "max_filter", options.max_filter)
        _check_length("allow", request.allow or (), "max_filter", options.max_filter)
        if request.k > options.max_k:
            raise RequestError(f"k={request.k}: exceeds serve.max_k={options.max_k}; ask for fewer")
        answer = await batcher(
            Ask(
                user=None if request.user is None else str(request.user),
                events=request.events,
                k=request.k,
                exclude=request.exclude,
                allow=None if request.allow is None else tuple(request.allow),
            )
        )
        items = [Item(item_key=key, score=score, title=answer.item_keys.title_of(key)) for key, score in answer.items]
        return RecommendAnswer(items=items, state=_view(answer), **_about(answer))

    @api.post("/events")
    async def events(request: EventsRequest) -> EventsAnswer:
        """Advance a user's state; what is answered is kept."""
        _check_length("events", request.events, "max_events", options.max_events)
        answer = await batcher(Ask(user=str(request.user), events=request.events, keep=True))
        view = _view(answer)
        assert view is not None
        return EventsAnswer(state=view, **_about(answer))

    @api.get("/items")
    def items(search: str = Query("", max_length=200), limit: int = Query(20, ge=1, le=_FOUND_ITEMS)) -> FoundItems:
        """Items of the catalogue whose key or title holds a text."""
        item_keys = service.live.current.item_keys
        found = find_items(item_keys, search, limit)
        return FoundItems(items=[FoundItem(item_key=key, title=item_keys.title_of(key)) for key in found])


def _add_facts(api: FastAPI, service: Service, metrics: ServiceMetrics) -> None:
    @api.get("/", include_in_schema=False)
    def page() -> HTMLResponse:
        return HTMLResponse(_PAGE.read_text(), headers={"content-security-policy": _PAGE_POLICY})

    @api.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Whether the process lives."""
        return {"status": "alive"}

    @api.get("/readyz")
    def readyz() -> dict[str, str]:
        """Whether requests would be answered: a version is loaded and the session store is there."""
        service.store.count()
        return {"status": "ready", "version": service.live.current.version}

    @api.get("/version")
    async def version() -> Version:
        """What serves."""
        recommender = service.live.current
        return Version(
            version=recommender.version,
            num_items=recommender.num_items,
            integer_keys=recommender.item_keys.integers,
            max_length=recommender.max_length,
            package=__version__,
        )

    @api.get("/metrics", response_class=PlainTextResponse)
    def prometheus() -> Response:
        """Figures of this process in the text format of Prometheus."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_problems(api: FastAPI) -> None:
    def problem(status: int, error: str, **headers: str) -> JSONResponse:
        return JSONResponse({"error": error}, status, headers)

    @api.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        # Where and why; not what was sent, which may be long.
        first = error.errors()[0]
        return problem(422, f"{'.'.join(map(str, first['loc']))}: {first['msg']}")

    @api.exception_handler(RequestError)
    async def refused(_: Request, error: RequestError) -> JSONResponse:
        return problem(422, str(error))

    @api.exception_handler(TryAgainError)
    async def busy(_: Request, error: TryAgainError) -> JSONResponse:
        return problem(503, str(error), **{"retry-after": "1"})

    @api.exception_handler(HTTPException)
    async def other(_: Request, error: HTTPException) -> JSONResponse:
        return problem(error.status_code, str(error.detail))

    @api.exception_handler(Exception)
    async def internal(_: Request, __: Exception) -> JSONResponse:  # the server writes its traceback
        return problem(500, "internal error; the log of the service has more")


def _metrics(service: Service, batcher: Batcher[Any, Any], follower: ChampionFollower | None) -> ServiceMetrics:
    counters: dict[str, tuple[str, Callable[[], float]]] = {
        "unknown_items": ("Events whose item the catalogue does not know.", lambda: service.unknown_items),
        "batches": ("Batches that requests were answered in.", lambda: batcher.batches),
        "batched_requests": ("Requests answered in batches.", lambda: batcher.requests),
        "states_new": ("States begun for users without one.", lambda: service.origins["new"]),
        "states_rebuilt": ("States made anew of kept events after a swap.", lambda: service.origins["rebuilt"]),
        "states_reset": ("States begun anew, as nothing was kept.", lambda: service.origins["reset"]),
        "swaps": ("Versions swapped in.", lambda: follower.swaps if follower else 0),
        "swap_failures": ("Looks at the registry that failed.", lambda: follower.failures if follower else 0),
    }
    paths = {"/", "/recommend", "/events", "/items", "/healthz", "/readyz", "/version", "/metrics"}
    gauges: dict[str, tuple[str, Callable[[], float]]] = {"states_held": ("States in the session store.", service.store.count)}
    return ServiceMetrics(paths, counters, gauges, lambda: service.live.current.version)


def _check_length(name: str, keys: Sequence[Key], setting: str, most: int) -> None:
    if len(keys) > most:
        raise RequestError(f"{name}: {len(keys):,} item keys exceed serve.{setting}={most:,}; send the last ones, or fewer")


def _about(answer: Answer) -> dict[str, Any]:
    rebuilt = answer.origin in ("rebuilt", "reset")
    return {"version": answer.version, "unknown_items": answer.unknown_items, "rebuilt": rebuilt}


def _view(answer: Answer) -> StateView | None:
    if answer.state is None or answer.origin is None:
        return None
    norms = answer.state.recurrent.flatten(1).norm(dim=1).tolist()
    return StateView(events=answer.state.events, norms=norms, origin=answer.origin)
