"""What the name of a triggered policy says: s2t-local-k4-w0@0.05 is S2T-Local with 4 candidates, prior weight 0 and a
budget of 5%.

    s2t[-METRIC][-dynamic-05][-t0.6][-p0.95][-k4][@0.05]   takeover[-METRIC][@0.05]
    s2t-local[-METRIC][-t0.6][-p0.95][-k4][-w0][@0.05][:ARTIFACT]

METRIC is kl, entropy or random; `@0.05` is the budget tau; `-dynamic-05` keeps candidates at least 5% as likely as the
top one; `-t` and `-p` draw candidates at a temperature and from a top-p share of the probability; ARTIFACT is one of
the recipe's `artifacts`. What the name leaves out is the recipe's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from s2t_models.hosting import LOCAL, Hosting, alongside
from s2t_models.policies.errors import PolicyError
from s2t_models.policies.triggers import TRIGGERS
from s2t_models.recipe import Recipe
from s2t_models.settings import MOST_CANDIDATES, CandidateSettings

_METRICS = "|".join(metric for metric, kind in TRIGGERS.items() if kind.make)
_NAME = re.compile(
    rf"(?P<stem>s2t-local|s2t|takeover)(?:-(?P<metric>{_METRICS}))?(?:-dynamic-(?P<percent>\d\d?))?"
    r"(?:-t(?P<temperature>\d{1,2}(?:\.\d+)?))?(?:-p(?P<top_p>\d?\.?\d+))?"
    r"(?:-k(?P<k>[1-9]\d{0,3}))?(?:-w(?P<weight>\d{1,4}(?:\.\d+)?))?(?:@(?P<budget>\d*\.?\d+))?"
    r"(?::(?P<artifact>.+))?"
)


@dataclass(frozen=True)
class Variant:
    """A triggered policy's name taken apart; None is what the name leaves to the recipe. `ratio` sizes a dynamic
    candidate set (Table A4), `temperature` and `top_p` draw one (Table A15), `kind` is the name without K and budget;
    `artifact` None is the recipe's own."""

    kind: str
    stem: str
    metric: str | None
    ratio: float | None
    temperature: float | None
    top_p: float | None
    k: int | None
    weight: float | None
    budget: float | None
    artifact: str | None

    @property
    def proposes(self) -> bool:
        """Whether the name says how candidates are proposed."""
        return any(setting is not None for setting in (self.ratio, self.temperature, self.top_p, self.k))

    @property
    def engine(self) -> str:
        """The engine of S2T-Local that the name asks for."""
        return alongside(LOCAL, self.artifact)


def kind_of(name: str) -> str:
    """The name of a triggered policy without K and budget; any other name as it is."""
    found = variant(name)
    return found.kind if found else name


def variant(name: str) -> Variant | None:
    """The name taken apart; None where it is not one of a triggered policy."""
    found = _NAME.fullmatch(name)
    if found is None or (found["artifact"] and found["stem"] != LOCAL):
        return None
    return Variant(
        kind=alongside(re.sub(r"-k\d+|@.*", "", name.partition(":")[0]), found["artifact"]),
        stem=found["stem"],
        metric=found["metric"],
        ratio=int(found["percent"]) / 100 if found["percent"] else None,
        temperature=float(found["temperature"]) if found["temperature"] else None,
        top_p=float(found["top_p"]) if found["top_p"] else None,
        k=int(found["k"]) if found["k"] else None,
        weight=float(found["weight"]) if found["weight"] else None,
        budget=float(found["budget"]) if found["budget"] else None,
        artifact=found["artifact"],
    )


def decoding_as_named(name: str, found: Variant, hosting: Hosting) -> Hosting:
    """What is hosted, with the settings of the artifact that the name asks for. Raises PolicyError where the recipe has
    no such artifact."""
    if found.artifact is None:
        return hosting
    if found.artifact not in hosting.artifacts:
        known = ", ".join(hosting.artifacts)
        there = f"there are {known}, as in s2t-local@0.05:{next(iter(hosting.artifacts))}" if known else "set artifacts"
        raise PolicyError(f"{name}: the recipe has no artifact {found.artifact!r}; {there}")
    return hosting.decoding_with(found.artifact)


def candidates_of(name: str, found: Variant, recipe: Recipe) -> CandidateSettings:
    """The recipe's candidate settings with what the name changes. Raises PolicyError where a step cannot have as
    many, or they cannot be drawn so."""
    if found.k and found.k > MOST_CANDIDATES:
        raise PolicyError(f"{name}: a step has at most {MOST_CANDIDATES} candidates")
    changes: dict[str, object] = {"k": found.k} if found.k else {}
    if found.ratio is not None:
        # As far as the support reaches: the ratio alone sizes the set (Table A4).
        changes = {"ratio": found.ratio, "method": "top_k", "k": found.k or recipe.divergence.support}
    drawn = {key: value for key in ("temperature", "top_p") if (value := getattr(found, key)) is not None}
    if drawn:
        if drawn.get("temperature") == 0 or not 0 < drawn.get("top_p", 1.0) <= 1:
            raise PolicyError(f"{name}: candidates are drawn at a temperature above 0, from a share of up to 1")
        changes |= {"method": "multinomial", **drawn}
    return recipe.candidates.model_copy(update=changes)
