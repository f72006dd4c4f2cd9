"""What goes in and out of the service as JSON; the descriptions are those of /openapi.json."""

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictInt, StrictStr

from lrurec_dist.serve.service import Origin


def _is_text(key: str) -> str:
    key.encode()  # half a surrogate pair, which JSON can hold, has no bytes in UTF-8; a UnicodeEncodeError is a ValueError
    return key


ItemKey = Annotated[StrictStr, AfterValidator(_is_text)] | StrictInt
UserKey = Annotated[ItemKey, Field(description='as in the log; 7 and "7" are one user')]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class RecommendRequest(_Body):
    """Either a user, whose session is asked, or events, which are the whole history then, or both."""

    user: UserKey | None = None
    events: list[ItemKey] = Field(
        default=[], description="item keys, oldest first; beside a user those that came since, which are not kept"
    )
    k: int = Field(default=10, ge=1, description="items wanted; fewer come where candidates run out")
    exclude: list[ItemKey] = Field(default=[], description="items to leave out, besides those of the history")
    allow: list[ItemKey] | None = Field(default=None, description="only these are candidates; null: all")


class EventsRequest(_Body):
    """New events of a user."""

    user: UserKey
    events: list[ItemKey] = Field(min_length=1, description="item keys, oldest first")


class Item(BaseModel):
    """An item, its score and its title if there is one."""

    item_key: ItemKey
    score: float
    title: str | None = None


class StateView(BaseModel):
    """What is known of a user."""

    events: int = Field(description="events of known items that made the state")
    norms: list[float] = Field(description="Euclidean norm of the recurrent state of each block")
    origin: Origin = Field(
        description="stored; new: there was none; rebuilt: made anew of the item keys that were kept, after a change of version; "
        "reset: begun anew, as there was nothing to make it of"
    )


class EventsAnswer(BaseModel):
    """The user's state after the events."""

    version: str = Field(description="of the bundle that answered")
    unknown_items: int = Field(description="events whose item the catalogue does not know; they change nothing")
    rebuilt: bool = Field(description="the stored state was another version's; state.origin says what became of it")
    state: StateView


class RecommendAnswer(BaseModel):
    """The best items, best first."""

    version: str = Field(description="of the bundle that answered")
    items: list[Item]
    unknown_items: int = Field(description="events whose item the catalogue does not know; they change nothing")
    rebuilt: bool = Field(description="the stored state was another version's; state.origin says what became of it")
    state: StateView | None = Field(description="of the user; null without one")


class FoundItem(BaseModel):
    """An item of the catalogue."""

    item_key: ItemKey
    title: str | None = None


class FoundItems(BaseModel):
    """Items whose key or title holds a text."""

    items: list[FoundItem]


class Version(BaseModel):
    """What serves."""

    version: str
    num_items: int
    integer_keys: bool = Field(description="whether item keys are integers; otherwise they are texts")
    max_length: int = Field(description="how many last events of a history without a user count")
    package: str = Field(description="version of lrurec_dist")


class Problem(BaseModel):
    """Why there is no answer."""

    error: str
