"""`smoltrain check-hosts`: the machines of a run look at each other, started as its ranks are; the odd one is named.

Every rank runs every check, as they are collective; rank 0 prints. A check that hangs ends all ranks.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator

from smoltrain.config.schema import Config
from smoltrain.distributed.peers import leave_peers
from smoltrain.distributed.world import World, close_world, open_world
from smoltrain.doctor.check import Check, Finding, finding_of_error
from smoltrain.doctor.host_checks import (
    check_clocks,
    check_compute,
    check_folder,
    check_links,
    check_sums,
    check_versions,
    describe_hosts,
)
from smoltrain.doctor.report import NamedFinding, exit_code_of, print_finding, print_verdict
from smoltrain.errors import FAULT, UserError
from smoltrain.terminal import open_console

LOST_HOST_S = 15.0  # without a sign of life of a machine
LIMIT_S = 90.0  # of one check; a file system may take half a minute to show a new file (run/shared_folder.py)


def examine_hosts(config: Config, *, as_json: bool) -> int:
    """Open the world, look at everything, and print on rank 0; the exit code, the same on every rank. Collective.

    Errors: UserError, TrainingStopped and RuntimeError, as those of a run that starts.
    """
    world = open_world(config.engine.device, LOST_HOST_S)
    found: list[NamedFinding] = []
    for check in list_host_checks(config, world):
        with end_if_stuck(check, world):
            finding = run_collective_check(check, world)
        named = NamedFinding(check.name, finding)
        found.append(named)
        if world.is_first and not as_json:
            print_finding(named)
            open_console().file.flush()
    code = exit_code_of(found)
    if world.is_first:
        print_verdict(found, as_json=as_json)
        sys.stdout.flush()
    world.barrier()
    leave_peers(code)
    close_world()
    return code


def list_host_checks(config: Config, world: World) -> list[Check]:
    """All of them; each is collective, and the same finding on every rank."""
    return [
        Check("hosts", lambda: describe_hosts(world), LIMIT_S),
        Check("versions", lambda: check_versions(world), LIMIT_S),
        Check("folder", lambda: check_folder(config, world), LIMIT_S),
        Check("clocks", lambda: check_clocks(world), LIMIT_S),
        Check("compute", lambda: check_compute(world), LIMIT_S),
        Check("links", lambda: check_links(world), LIMIT_S),
        Check("all-reduce", lambda: check_sums(world), LIMIT_S),
    ]


def run_collective_check(check: Check, world: World) -> Finding:
    """What rank 0 finds, on every rank; a mistake that all ranks raise is a finding too."""
    try:
        own = check.run()
    except UserError as error:
        own = finding_of_error(error)
    return world.run_on_first_rank(lambda: own)


@contextlib.contextmanager
def end_if_stuck(check: Check, world: World) -> Iterator[None]:
    """A collective cannot be left: if the block takes too long, this process says so and ends."""

    def end_process() -> None:
        if world.is_first_of_machine:
            host = world.hosts[world.rank]
            print(f"error: {host}: {check.name} has not ended within {check.limit_s:g} s", file=sys.stderr, flush=True)
        time.sleep(1.0)  # for the other machines to say so too
        os._exit(FAULT)

    timer = threading.Timer(check.limit_s, end_process)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
