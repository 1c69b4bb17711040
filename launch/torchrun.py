"""torchrun with the exit code of its ranks, and without a traceback when they were asked to stop.

    python launch/torchrun.py --nnodes 2 ... launch/train.py RECIPE ...      with all of torchrun's own options

torchrun itself ends with 1 whatever its ranks have said, so that SLURM and Kubernetes cannot tell a run that has saved
(75) from a mistake (2) or a fault (1); and it ends with a traceback, which adds nothing to its log. What it raises
stands in torch/distributed/launcher/api.py, launch_agent.
"""

import signal
import sys
from types import FrameType

from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing import api as torch_agent
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.run import main

from smoltrain.distributed.stop import STOP_SIGNALS
from smoltrain.errors import BAD_INPUT, DONE, FAULT, STOPPED, Problem, UserError, exception_message, format_error

raise_signal_exception = torch_agent._terminate_process_handler


def heed_first_signal(number: int, frame: FrameType | None) -> None:
    """Torch's own handler of signals, once: SLURM preempts with two SIGTERM at once.

    A second exception would end the wait for the ranks that the first one has begun, or be printed as a traceback by
    the logging that it falls into.
    """
    for known in STOP_SIGNALS:
        signal.signal(known, signal.SIG_IGN)
    raise_signal_exception(number, frame)


def choose_exit_code(failed: ChildFailedError) -> int:
    """That of the rank which failed first; "asked to stop" only if no rank says anything worse.

    A rank that a signal has killed (a negative code: out of memory, say) is a fault.
    """
    failures = sorted(failed.failures.values(), key=lambda failure: failure.timestamp)
    for failure in failures:
        if failure.exitcode != STOPPED:
            return failure.exitcode if failure.exitcode > 0 else FAULT
    return STOPPED


def run_torchrun(words: list[str]) -> int:
    """Run torchrun with these words; returns the exit code.

    A signal to torchrun itself is passed on to its ranks, which it awaits without hearing their exit codes: that is 75
    too. If they could not save, which they say, the next start goes on from the checkpoint before.
    """
    torch_agent._terminate_process_handler = heed_first_signal
    try:
        main(words)
    except SignalException as stopped:
        print(f"torchrun: its ranks were asked to stop by {stopped.sigval.name}", file=sys.stderr, flush=True)
        return STOPPED
    except ChildFailedError as failed:
        return choose_exit_code(failed)
    except (DistError, RendezvousError) as error:  # before any rank is there, or as the store of a rendezvous is lost
        is_taken = "EADDRINUSE" in str(error)
        want = "a port that is free" if is_taken else "a first machine that is there, and that the others reach"
        options = "--master-port, --master-addr or --rdzv-endpoint"
        problem = Problem("the machines do not meet", exception_message(error), want, options)
        print(format_error(UserError(problem)), file=sys.stderr, flush=True)
        return BAD_INPUT if is_taken else FAULT
    return DONE


if __name__ == "__main__":
    sys.exit(run_torchrun(sys.argv[1:]))
