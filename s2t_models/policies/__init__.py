"""Policies by name: the name a policy is served under says what it is, with which settings, at which budget.

    greedy  sample  maj@8  llm  llm-sample  specreason  multiplex  tah  r2r  kd  distil  tsd-kd  <any checkpoint>
    s2t[-METRIC][-dynamic-05][-t0.6][-p0.95][-k4][@0.05]   takeover[-METRIC][@0.05]
    s2t-local[-METRIC][-t0.6][-p0.95][-k4][-w0][@0.05][:ARTIFACT]   r2r[:ROUTER]

A policy is a file with its class and two functions, `names(hosting)` (what it lists) and `build(name, hosting)` (None
where the name is not its own; PolicyError where it cannot be had), and a place in `KINDS`. The registry knows what a
recipe hosts, not running engines.
"""

from __future__ import annotations

from types import ModuleType

from s2t_models.engines.load import capabilities
from s2t_models.hosting import Hosting
from s2t_models.policies import collaborate, local, majority, multiplex, r2r, single, specreason, tah
from s2t_models.policies.base import Policy
from s2t_models.policies.errors import PolicyError

__all__ = ["KINDS", "Policy", "PolicyError", "lacking", "names", "offer", "policy"]

KINDS: list[ModuleType] = [single, majority, collaborate, local, r2r, specreason, multiplex, tah]


def names(hosting: Hosting) -> list[str]:
    """The policies that there are, servable here or not; budgets and settings can be added to the names (see above)."""
    return [name for kind in KINDS for name in kind.names(hosting)]


def policy(name: str, hosting: Hosting) -> Policy:
    """The policy of that name. Raises PolicyError where there is no such policy, threshold or router."""
    for kind in KINDS:
        built: Policy | None = kind.build(name, hosting)
        if built is not None:
            return built
    raise PolicyError(
        f"no policy named {name!r}; there are: {', '.join(names(hosting))}; "
        "maj@N takes any N, s2t and takeover a budget as @0.05"
    )


def lacking(wanted: Policy, hosting: Hosting) -> str | None:
    """Why the policy cannot be served by what is hosted, in one line; None where it can."""
    for engine, needed in wanted.needs.items():
        hosted = hosting.engines.get(engine)
        if hosted is None:
            return f"{wanted.name} needs the engine {engine}, which is not served here"
        if missing := sorted(needed - capabilities(hosted)):
            kind = hosted.settings.engine
            return f"{wanted.name} needs {', '.join(missing)} of {engine}, which a {kind} engine does not have here"
    return None


def offer(hosting: Hosting) -> tuple[dict[str, Policy], dict[str, str]]:
    """The policies that can be served, by name, and of all others the reason why they cannot."""
    offered: dict[str, Policy] = {}
    refused: dict[str, str] = {}
    for name in names(hosting):
        try:
            built = policy(name, hosting)
            reason = lacking(built, hosting)
        except PolicyError as error:
            reason = str(error)
        if reason is None:
            offered[name] = built
        else:
            refused[name] = reason
    return offered, refused
