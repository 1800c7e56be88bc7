"""One pass over the data, with all arguments resolved."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import nn

from nss_prune.core.models import device_of, evaluation
from nss_prune.core.processes import agreed, processes, refuse_sharded, total_by_key
from nss_prune.core.shards import without_padding
from nss_prune.core.undo import left_as_found
from nss_prune.graph.neurons import NeuronMap
from nss_prune.profiling.accumulation import Collector, alone
from nss_prune.profiling.notes import notes_on_rule
from nss_prune.profiling.profile import Profile, profile_of
from nss_prune.profiling.scores import Scores
from nss_prune.profiling.settings import Comparison, Objective, Upkeep
from nss_prune.profiling.streaming import stream_parts
from nss_prune.statistics.consumers import ConsumerSums

BYTES = 12  # for each pair of neurons: a sum in float64, and observations that wait in float32


@agreed()
def one_pass(
    model: nn.Module,
    data: Iterable[Any],
    neurons: NeuronMap,
    example_inputs: Any,
    comparison: Comparison,
    objective: Objective,
    upkeep: Upkeep,
    minimum_samples: int = 2,
) -> Profile:
    """The profile of known neurons. See :func:`nss_prune.profiling.run.profile_neurons`."""
    landscape, keep_statistics = comparison.landscape, upkeep.keep_statistics
    metrics, groups = comparison.chosen, neurons.groups
    refuse_sharded(model)
    with left_as_found(model):
        data, meaning = objective.meaning(
            model, without_padding(data), metrics, comparison.categories
        )
    scores = Scores(groups, metrics, landscape, keep_statistics, ranking=comparison.ranking)
    baseline = objective.reference(data, metrics)
    consumers = ConsumerSums(model, groups)
    # Activations of "flat" features take half of the memory.
    limit = upkeep.memory_limit // 2 if landscape.features == "flat" else upkeep.memory_limit
    collector = Collector(
        groups,
        metrics,
        landscape,
        comparison.categories,
        objective.loss,
        device_of(model),
        baseline,
        consumers.watching if upkeep.keep_readers else alone,
        meaning,
        objective.forward,
        limit / processes(),
    )
    room = max(1, limit // sum(BYTES * group.size**2 for group in groups))
    with left_as_found(model), evaluation(model):
        for part, sums in stream_parts(
            model, data, collector, room, separate=keep_statistics, progress=upkeep.progress
        ):
            scores.add(part, sums)
            if not keep_statistics:
                for used in sums.values():
                    collector.reuse(used)
    counted = total_by_key({True: collector.used, False: collector.unused})
    scores.count(counted[True], counted[False])
    notes = notes_on_rule(collector.uncovered)
    found = profile_of(neurons, scores, comparison.interval, minimum_samples, notes)
    if not upkeep.keep_readers:
        return found
    return replace(found, consumers=consumers.surveyed(example_inputs, objective.forward))
