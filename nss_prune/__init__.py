"""Neuron-level semantic slicing for torch-pruning: fewer neurons, same semantics."""

from nss_prune.adaptation.incremental import IncrementalTrainer
from nss_prune.adaptation.readapt import ReadaptTrainer
from nss_prune.adaptation.tasks import Task
from nss_prune.allocation.importance import NSSImportance
from nss_prune.core.views import Views
from nss_prune.deeparc.arc import DeepArc
from nss_prune.finetuning.finetune import FinetuneResult, finetune
from nss_prune.graph.slices import Slice
from nss_prune.profiling.profile import Profile
from nss_prune.profiling.run import PAPER, profile
from nss_prune.pruner.accuracy import accuracy_on
from nss_prune.pruner.checkpoint import load_pruned, save_pruned
from nss_prune.pruner.hub import from_pretrained, push_to_hub, save_pretrained
from nss_prune.pruner.optimizers import rebind_optimizer
from nss_prune.pruner.pruner import NSSPruner
from nss_prune.pruner.report import Report
from nss_prune.pruner.restructure import Restructured, restructure
from nss_prune.surgery.removal import remove
from nss_prune.unstructured import sparsify

__version__ = "0.2.0"


__all__ = [
    "PAPER",
    "DeepArc",
    "FinetuneResult",
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
    "accuracy_on",
    "finetune",
    "from_pretrained",
    "load_pruned",
    "profile",
    "push_to_hub",
    "rebind_optimizer",
    "remove",
    "restructure",
    "save_pretrained",
    "save_pruned",
    "sparsify",
]
