"""What an adapter of a user's own needs: the protocol, the known structures, how to try one."""

from nss_prune.discovery.claims import adapted, claims, joined
from nss_prune.discovery.trial import adapted_on_trial
from nss_prune.graph.neurons import Member, NeuronGroup, NeuronMap, covering
from nss_prune.structures.attention import Attention
from nss_prune.structures.gated import GatedUnit
from nss_prune.structures.known import ADAPTERS
from nss_prune.structures.protocol import Adapter, Change
from nss_prune.surgery.metadata import apply_changes, planned_changes

__all__ = [
    "ADAPTERS",
    "Adapter",
    "Attention",
    "Change",
    "GatedUnit",
    "Member",
    "NeuronGroup",
    "NeuronMap",
    "adapted",
    "adapted_on_trial",
    "apply_changes",
    "claims",
    "covering",
    "joined",
    "planned_changes",
]
