"""One rank of a training run, for launchers that want a script: `deepspeed launch/train.py RECIPE ...`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("smoltrain.launch.rank", run_name="__main__")
