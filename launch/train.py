"""One rank of a training run: `deepspeed launch/train.py RECIPE [key=value ...]`, or torchrun, or plain python."""

import os
import sys
import traceback
import warnings

from smoltrain.errors import BAD_INPUT, FAULT, TrainingStopped, UserError, report


def main(words: list[str]) -> int:
    """Train what the command line says; returns the exit code."""
    words = [word for word in words if not word.startswith("--local_rank")]  # DeepSpeed's launcher adds it
    is_first = os.environ.get("RANK", "0") == "0"
    try:
        from smoltrain import config, train

        if not words or "=" in words[0]:
            words = ["quickstart", *words]
        return train.run(config.load(words[0], words[1:]))
    except (UserError, TrainingStopped) as error:
        if is_first:
            print(report(error), file=sys.stderr)
        return BAD_INPUT if isinstance(error, UserError) else FAULT
    except BaseException:
        traceback.print_exc()
        return FAULT


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning)
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # the threads of DeepSpeed's CPU ranks abort now and then in a normal exit, with a false exit code
