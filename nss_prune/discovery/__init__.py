"""The neurons of any model: traced whole or in parts, adapters on trial."""

from nss_prune.discovery.whole import discover

__all__ = ["discover"]
