"""The same recipe on more and more ranks: tokens/s, efficiency, where more ranks stop to pay, what failures take."""

import re
from dataclasses import dataclass

from smoltrain.config.schema import Config
from smoltrain.engine.optimizer import checkpoint_bytes
from smoltrain.errors import Problem, UserError
from smoltrain.estimate.constants import (
    CHECKPOINT_COPY,
    CHECKPOINT_PAUSE_S,
    CHECKPOINT_WRITE,
    EFFICIENCY,
    RESTART_S,
    DeviceSpec,
    EfficiencyRates,
)
from smoltrain.estimate.failures import CheckpointCadence, FailureCosts, choose_cadence
from smoltrain.estimate.fitting import fits_memory, resolve_and_fit
from smoltrain.estimate.network import NetworkWish, build_network
from smoltrain.estimate.speed import SpeedEstimate, estimate_speed
from smoltrain.estimate.training_setup import TrainingSetup

MOST_RANKS = 1_000_000
PAYING_SHARE = 0.5  # of what a rank of the smallest world does: an added rank that does less does not pay


@dataclass(frozen=True)
class ScalingPoint:
    """One world."""

    setup: TrainingSetup
    speed: SpeedEstimate
    nodes: int
    efficiency: float  # tokens/s of a rank, over those of a rank of the smallest world
    cadence: CheckpointCadence | None  # on one node alone there is none
    fits: bool  # in the memory of each rank

    @property
    def world(self) -> int:
        """Ranks."""
        return self.setup.world

    @property
    def kept_tokens_per_s(self) -> float:
        """What is left of tokens/s after failures and checkpoints."""
        return self.speed.tokens_per_s * (1 - (self.cadence.lost_share if self.cadence else 0.0))


@dataclass(frozen=True)
class Scaling:
    """All worlds that the rows divide among, from the smallest; of the others, why not."""

    points: list[ScalingPoint]
    skipped: dict[int, str]
    costs: FailureCosts | None  # those of the largest world; None where all are one node

    @property
    def last_that_pays(self) -> ScalingPoint:
        """The largest world up to which each step upwards pays."""
        last = self.points[0]
        by_rank = last.kept_tokens_per_s / last.world
        for point in self.points[1:]:
            added = (point.kept_tokens_per_s - last.kept_tokens_per_s) / (point.world - last.world)
            if added < PAYING_SHARE * by_rank:
                break
            last = point
        return last


def parse_worlds(text: str) -> list[int]:
    """8: one world; 8..1024: each twice the one before, and the last; 8,12,64: these. Errors: UserError."""
    ends = re.fullmatch(r"(\d+)\.\.(\d+)", text)
    worlds: list[int] = []
    if ends:
        world = int(ends[1])
        last = int(ends[2])
        while 0 < world < last:
            worlds.append(world)
            world *= 2
        if worlds or world == last:
            worlds.append(last)
    elif re.fullmatch(r"\d+(,\d+)*", text):
        worlds = sorted({int(word) for word in text.split(",")})
    if not worlds or min(worlds) < 1 or max(worlds) > MOST_RANKS:
        want = f"1 to {MOST_RANKS:,} ranks: a number, a range as 8..1024, or a list as 8,12,64"
        raise UserError(Problem("no such worlds", repr(text), want, "--world"))
    return worlds


def estimate_scaling(
    config: Config, worlds: list[int], device: DeviceSpec, wish: NetworkWish, node_mtbf_hours: float,
    rates: EfficiencyRates | None = None,
) -> Scaling:  # fmt: skip
    """The recipe on each of these worlds, by the device's usual rates or by others.

    Errors: UserError where none of them can be, or for a link.
    """
    points: list[ScalingPoint] = []
    skipped: dict[int, str] = {}
    problems: list[Problem] = []
    costs: FailureCosts | None = None
    rates = rates or EFFICIENCY[device.kind]
    for world in worlds:
        network = build_network(device, rates, world, wish)
        try:
            _, setup = resolve_and_fit(config, device, world)
        except UserError as error:
            problems.extend(error.problems)
            skipped[world] = "; ".join(f"{problem.what}, {problem.saw}" for problem in error.problems)
            continue
        speed = estimate_speed(setup, device, rates, network)
        nodes = network.num_nodes(world)
        cadence = None
        if nodes > 1:
            costs = failure_costs(setup, node_mtbf_hours)
            cadence = choose_cadence(nodes, costs)
        by_rank = speed.tokens_per_s / world
        smallest = points[0] if points else None
        efficiency = by_rank / (smallest.speed.tokens_per_s / smallest.world) if smallest else 1.0
        fits = fits_memory(setup, device.memory)
        points.append(ScalingPoint(setup, speed, nodes, efficiency, cadence, fits))
    if not points:
        raise UserError(*dict.fromkeys(problems))  # each once
    return Scaling(points, skipped, costs)


def failure_costs(setup: TrainingSetup, node_mtbf_hours: float) -> FailureCosts:
    """Of a setup: a rank copies its part of the checkpoint, rank 0 the weights beside; one folder takes all."""
    hidden = setup.shape.hidden_parameters
    other = setup.shape.parameters - hidden
    in_all = checkpoint_bytes(setup.optimizer, hidden, other, setup.weight_bytes)
    weights = setup.weight_bytes * setup.shape.parameters
    copied = weights + (in_all - weights) / (setup.world if setup.stage else 1)
    return FailureCosts(
        node_mtbf_s=node_mtbf_hours * 3600,
        pause_s=CHECKPOINT_PAUSE_S + copied / CHECKPOINT_COPY,
        publish_s=in_all / CHECKPOINT_WRITE,
        restart_s=RESTART_S,
    )
