"""Whether torch.compile is worth its time: the minutes that it saves of a run against those that it takes.

A rule of the recipe and the kind of device alone, so that every start and every resume of a run computes alike: the
minutes are those of one machine of that kind, not of the one that runs. On a slower one, or where the code was compiled
before and is only loaded, compiling pays earlier; where several GPUs share a run, later.
"""

import math
from typing import Literal, NamedTuple

MINUTE_S = 60


class CompileGain(NamedTuple):
    """What compiling does on one machine."""

    machine: str
    flop_per_s: float  # of a run that is not compiled, operations as flops_per_token counts them
    saved_share: float  # of the time of such a run
    cost_minutes: dict[str, float]  # of a first start, by engine.compile_region


GAINS = {
    # Two cores of an AMD EPYC (Zen 4). A block compiled: 1.12 times as fast (SmolLM2-135M, T 512, micro-batch 4), and
    # 336 GFLOP/s in that shape (docs/performance.md: 368 tokens/s). Cold, a start takes 28 s of CPU more
    # (docs/results/start-up.md: 40.6 - 12.7). All 30 blocks as one region: 60 s until the end of the first micro-batch.
    "cpu": CompileGain("two CPU cores", 300e9, saved_share=1 - 1 / 1.12, cost_minutes={"block": 0.5, "model": 1.0}),
    # A guess, no GPU was at hand: nanoGPT's README has a step of GPT-2 124M fall from 250 to 135 ms, 46 %, and its
    # train.py says "takes a ~minute", for twelve blocks. Here attention and loss are fused before anything is compiled,
    # and one block is compiled for all. Compiled, 41 % of 989 TFLOP/s, as llm.c reaches on an H100.
    "cuda": CompileGain("an H100", 0.7 * 0.41 * 989e12, saved_share=0.3, cost_minutes={"block": 0.5, "model": 1.0}),
}


class CompileChoice(NamedTuple):
    """Whether code is compiled, and in a few words why."""

    on: bool
    reason: str


def weigh_compiling(device_type: str, flop: float, region: Literal["block", "model"] = "block") -> CompileChoice:
    """For so many operations of a whole plan; of one whose length is not known yet (inf) they are taken to be enough.

    Runs that start kernels for longer than they compute, of tiny batches on a GPU, take longer than is said here.
    """
    if math.isinf(flop):
        return CompileChoice(True, "auto: the length of the plan, not known yet, is taken to be worth it")
    gain = GAINS[device_type]
    run_minutes = flop / gain.flop_per_s / MINUTE_S
    saved_minutes = run_minutes * gain.saved_share
    numbers = f"about {saved_minutes:,.1f} of {run_minutes:,.1f} minutes of {gain.machine}"
    cost_minutes = gain.cost_minutes[region]
    if saved_minutes >= cost_minutes:
        return CompileChoice(True, f"auto: saves {numbers}, costs {cost_minutes:.1f}")
    return CompileChoice(False, f"auto: would save {numbers}, and cost {cost_minutes:.1f}")
