"""What failures of nodes cost a run, and how often it should write a checkpoint: pure functions.

A job of M nodes fails M times as often as one of them. A checkpoint each tau seconds loses its pause d out of d + tau,
and a failure the work since the last one, tau / 2 on average, and a restart. Young (1974) minimises the first order of
it, tau = sqrt(2 d F) at a mean time F between failures; Daly (2006, eq. 37) adds terms that matter where F is short.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class FailureCosts:
    """What a run loses where, seconds."""

    node_mtbf_s: float  # mean time between failures of one node
    pause_s: float  # that training waits for a checkpoint
    publish_s: float  # until a checkpoint counts, written beside training
    restart_s: float  # from a failure until training goes on: it is noticed, everything starts, the checkpoint is read


@dataclass(frozen=True)
class CheckpointCadence:
    """How often to write one, and what is lost then."""

    between_failures_s: float  # of the whole job
    every_s: float  # of training between two checkpoints
    lost_share: float  # of all time


def young_interval(pause_s: float, between_failures_s: float) -> float:
    """Seconds of training between two checkpoints, to the first order."""
    return math.sqrt(2 * pause_s * between_failures_s)


def daly_interval(pause_s: float, between_failures_s: float) -> float:
    """The same to a higher order; no longer than the time between two failures, which it is where pauses are long."""
    if pause_s >= 2 * between_failures_s:
        return between_failures_s
    ratio = pause_s / (2 * between_failures_s)
    return young_interval(pause_s, between_failures_s) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - pause_s


def choose_cadence(nodes: int, costs: FailureCosts) -> CheckpointCadence:
    """The cadence for so many nodes: Daly's, but no checkpoint begins before the one before is published."""
    between_s = costs.node_mtbf_s / nodes
    every_s = max(daly_interval(costs.pause_s, between_s), costs.publish_s)
    return CheckpointCadence(between_s, every_s, lost_share(every_s, between_s, costs))


def lost_share(every_s: float, between_failures_s: float, costs: FailureCosts) -> float:
    """Share of all time that is not training, with a checkpoint so often; 1 where failures leave nothing.

    A failure that comes while a checkpoint is written goes back to the one before: `publish_s` more is lost of each.
    """
    pauses = costs.pause_s / (every_s + costs.pause_s)
    lost_s = (every_s + costs.pause_s) / 2 + costs.publish_s + costs.restart_s
    return min(1.0, pauses + lost_s / between_failures_s)
