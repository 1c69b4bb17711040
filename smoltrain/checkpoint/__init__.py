"""Checkpoints that are whole or not there: written aside, hashed, named in a manifest, renamed, verified before use.

checkpoints/step-00000200/
    deepspeed/*.pt        DeepSpeed's shards: weights, fp32 masters, the optimizer's state
    rank-00000.pt         one per rank: the state of its random number generators
    model.safetensors     the weights alone, in compute precision, for everything that is not training
    manifest.json         written last: step, world, loader state, SHA-256 of every other file and of itself

A folder whose name ends in .tmp is in the making, or on its way out; the next start sweeps it.
"""
