"""How much a neuron contributes: one metric a file, one protocol."""

from __future__ import annotations

from nss_prune.profiling.contributions.average import Average
from nss_prune.profiling.contributions.deeplift import DeepLift
from nss_prune.profiling.contributions.ensemble import Ensemble
from nss_prune.profiling.contributions.protocol import (
    Contribution,
    metric_named,
    metrics_known,
    needs_reference,
    register_metric,
)
from nss_prune.profiling.contributions.taylor import Taylor
from nss_prune.profiling.contributions.variance import Variance

for metric in (Average(), Variance(), Ensemble(), DeepLift(), Taylor()):
    register_metric(metric)


__all__ = [
    "Average",
    "Contribution",
    "DeepLift",
    "Ensemble",
    "Taylor",
    "Variance",
    "metric_named",
    "metrics_known",
    "needs_reference",
    "register_metric",
]
