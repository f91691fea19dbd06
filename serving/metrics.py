"""What a gateway counts, for Prometheus.

The decode path and the middleware call the functions below. Each replica of the gateway counts for itself, and
`GET /metrics` of any of them shows all, told apart by the label `replica`: sum over it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest
from prometheus_client.samples import Sample

REGISTRY = CollectorRegistry()
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)
#: Names of policies may hold any number: those beyond this many are counted together as "other".
MOST_POLICIES = 200
_policies: set[str] = set()

_requests = Counter("s2t_requests", "Requests that ended.", ["policy", "status", "key"], registry=REGISTRY)
_seconds = Histogram(
    "s2t_request_seconds", "From a request's arrival to its end.", ["policy"], buckets=_SECONDS, registry=REGISTRY
)
_first_token = Histogram(
    "s2t_first_token_seconds", "From arrival to the first token.", ["policy"], buckets=_SECONDS, registry=REGISTRY
)
_tokens = Counter(
    "s2t_tokens", "Tokens an engine read (prefill), wrote (decode), scored.", ["engine", "kind"], registry=REGISTRY
)
_decisions = Counter("s2t_decisions", "Triggered steps.", ["policy"], registry=REGISTRY)
_rescues = Counter("s2t_rescues", "Decisions that did not take the SLM's first.", ["policy"], registry=REGISTRY)
_refused = Counter("s2t_refused", "Requests that were not let in.", ["reason"], registry=REGISTRY)
#: Requests that are being answered. `with in_flight.track_inprogress():` counts a block.
in_flight = Gauge("s2t_in_flight", "Requests that are being answered.", registry=REGISTRY)
#: Requests let in that wait for their turn.
waiting = Gauge("s2t_waiting", "Requests that wait for their turn.", registry=REGISTRY)


def observe_request(policy: str, key: str, status: int, seconds: float) -> None:
    """A request ended: under which policy ("" where it did not come to one), by whose key ("" without keys)."""
    name = _bounded(policy)
    _requests.labels(name, str(status), key).inc()
    _seconds.labels(name).observe(seconds)


def observe_first_token(policy: str, seconds: float) -> None:
    """The first token of an answer was there, `seconds` after the request."""
    _first_token.labels(_bounded(policy)).observe(seconds)


def observe_decode(policy: str, usage_by_engine: Mapping[str, Mapping[str, int]], decisions: int, rescues: int) -> None:
    """What an answer cost: per engine the fields of `Usage`, and how many decisions and rescues it took."""
    for engine, usage in usage_by_engine.items():
        for kind in ("prefill", "decode", "leaves"):
            _tokens.labels(engine, kind).inc(usage.get(kind, 0))
    _decisions.labels(_bounded(policy)).inc(decisions)
    _rescues.labels(_bounded(policy)).inc(rescues)


def refused(reason: str, count: int = 1) -> None:
    """Requests were not let in; `reason` is one of a few words, such as "key", "body" or "busy"."""
    _refused.labels(reason).inc(count)


def counted() -> list[Metric]:
    """This replica's metrics as they stand."""
    return list(REGISTRY.collect())


def page(by_replica: Mapping[str, Iterable[Metric]]) -> bytes:
    """The metrics of all replicas in Prometheus' text format."""
    merged: dict[str, Metric] = {}
    for replica, metrics in by_replica.items():
        for metric in metrics:
            whole = merged.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type, metric.unit))
            whole.samples += [_of(replica, sample) for sample in metric.samples if not _is_birth(sample)]
    return generate_latest(_Merged(merged.values()))  # type: ignore[arg-type]  # it asks for nothing but `collect`


class _Merged:
    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        yield from self._metrics


def _of(replica: str, sample: Sample) -> Sample:
    return sample._replace(labels={**sample.labels, "replica": replica})


def _is_birth(sample: Sample) -> bool:
    """Whether it says since when there is a series, which nobody asks for."""
    return sample.name.endswith("_created")


def _bounded(policy: str) -> str:
    if policy not in _policies:
        if len(_policies) >= MOST_POLICIES:
            return "other"
        _policies.add(policy)
    return policy
