"""A Ray node provider for AWS that falls back from spot to on-demand instances.

Ray's own autoscaler has no such fall-back for AWS: it requests a refused instance type again,
whatever other types there are (Ray 2.60: its ``CloudResourceMonitor`` learns of instances that
started without Ray, but not of instances that never started).
"""

from __future__ import annotations

import logging
from typing import Any

from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler.node_launch_exception import NodeLaunchException

MARKET = "InstanceMarketOptions"
# https://docs.aws.amazon.com/AWSEC2/latest/APIReference/errors-overview.html
NO_SPOT = {
    "InsufficientInstanceCapacity",  # none in any zone of the launcher file
    "MaxSpotInstanceCountExceeded",  # the account's quota of spot instances
    "SpotMaxPriceTooLow",
}
logger = logging.getLogger(__name__)


class SpotFirst(AWSNodeProvider):  # type: ignore[misc]
    """The provider; a launcher file uses it as ``provider: {module:
    batchgen.cluster.spot.SpotFirst, ...}``."""

    def create_node(
        self, node_config: dict[str, Any], tags: dict[str, str], count: int
    ) -> dict[str, Any]:
        """Start ``count`` instances of ``node_config``: spot if available, the rest on demand.

        Returns:
            Id -> instance, for those that were started.

        Raises:
            NodeLaunchException: AWS starts none, for another reason than a lack of spot capacity.
        """
        started: dict[str, Any] = {}
        try:
            started.update(super().create_node(node_config, tags, count))
        except NodeLaunchException as refused:
            if MARKET not in node_config or refused.category not in NO_SPOT:
                raise
            logger.warning("no spot instance: %s", refused.description)
        missing = count - len(started)
        if MARKET in node_config and missing > 0:
            logger.warning("%d of %d instances are started on demand", missing, count)
            on_demand = {name: value for name, value in node_config.items() if name != MARKET}
            started.update(super().create_node(on_demand, tags, missing))
        return started
