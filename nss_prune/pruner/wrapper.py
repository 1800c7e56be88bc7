"""DistributedDataParallel around a model that shrank."""

from __future__ import annotations

from torch.nn.parallel import DistributedDataParallel

WRAPPER_SETTINGS = (
    "device_ids",
    "output_device",
    "dim",
    "broadcast_buffers",
    "process_group",
    "find_unused_parameters",
    "gradient_as_bucket_view",
    "static_graph",
)


def wrap_again(wrapper: DistributedDataParallel) -> None:
    """Let a wrapper follow its model, whose parameters are others than those it was made for."""
    own = vars(wrapper)
    settings = {name: own[name] for name in WRAPPER_SETTINGS if name in own}
    if "bucket_bytes_cap" in own:
        settings["bucket_cap_mb"] = own["bucket_bytes_cap"] / 2**20
    wrapper.__init__(wrapper.module, **settings)  # type: ignore[misc]
