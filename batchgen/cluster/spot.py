"""Ray's provider of AWS machines, which takes on demand what is not to be had on spot.

Ray's own autoscaler has no such fall-back for AWS: a type whose start is refused is asked for
again, whatever other types there are (Ray 2.60: its ``CloudResourceMonitor`` hears of machines that
came and did not start Ray, not of machines that never came).
"""

from __future__ import annotations

import logging
from typing import Any

from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler.node_launch_exception import NodeLaunchException

MARKET = "InstanceMarketOptions"
# https://docs.aws.amazon.com/AWSEC2/latest/APIReference/errors-overview.html
NO_SPOT = {
    "InsufficientInstanceCapacity",  # none in any zone of the file
    "MaxSpotInstanceCountExceeded",  # the account's quota of spot machines
    "SpotMaxPriceTooLow",
}
logger = logging.getLogger(__name__)


class SpotFirst(AWSNodeProvider):  # type: ignore[misc]
    """In a launcher file: ``provider: {module: batchgen.cluster.spot.SpotFirst, ...}``."""

    def create_node(
        self, node_config: dict[str, Any], tags: dict[str, str], count: int
    ) -> dict[str, Any]:
        """Start ``count`` machines as ``node_config`` has it, on spot as many as there are.

        Returns:
            Id -> machine, of those that were started.

        Raises:
            NodeLaunchException: AWS starts none, and not for want of spot machines only.
        """
        started: dict[str, Any] = {}
        try:
            started.update(super().create_node(node_config, tags, count))
        except NodeLaunchException as refused:
            if MARKET not in node_config or refused.category not in NO_SPOT:
                raise
            logger.warning("no spot machine: %s", refused.description)
        missing = count - len(started)
        if MARKET in node_config and missing > 0:
            logger.warning("%d of %d machines are taken on demand", missing, count)
            on_demand = {name: value for name, value in node_config.items() if name != MARKET}
            started.update(super().create_node(on_demand, tags, missing))
        return started
