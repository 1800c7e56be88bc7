"""Neuron-level semantic slicing for torch-pruning: fewer neurons, same semantics."""

from nss_prune.adaptation import IncrementalTrainer, ReadaptTrainer, Task
from nss_prune.checkpoint import load_pruned, save_pruned
from nss_prune.deeparc import DeepArc
from nss_prune.importance import NSSImportance
from nss_prune.optimizers import rebind_optimizer
from nss_prune.profile import PAPER, Profile, profile
from nss_prune.pruner import NSSPruner
from nss_prune.removal import remove
from nss_prune.report import Report
from nss_prune.restructure import Restructured, restructure
from nss_prune.slicing import Slice
from nss_prune.unstructured import sparsify
from nss_prune.views import Views

__version__ = "0.1.0"

__all__ = [
    "PAPER",
    "DeepArc",
    "IncrementalTrainer",
    "NSSImportance",
    "NSSPruner",
    "Profile",
    "ReadaptTrainer",
    "Report",
    "Restructured",
    "Slice",
    "Task",
    "Views",
    "load_pruned",
    "profile",
    "rebind_optimizer",
    "remove",
    "restructure",
    "save_pruned",
    "sparsify",
]
