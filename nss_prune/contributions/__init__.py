"""How much a neuron contributes: one metric a file, one protocol."""

from __future__ import annotations

from nss_prune.contributions.protocol import Contribution, metric_named, register_metric
from nss_prune.contributions.taylor import Taylor

register_metric(Taylor())

__all__ = ["Contribution", "Taylor", "metric_named", "register_metric"]
