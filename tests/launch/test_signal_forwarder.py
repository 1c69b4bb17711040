"""Which signals are listened to; what they do to ranks: test_rank_processes.py."""

import signal

from smoltrain.launch.signal_forwarder import SignalForwarder


def test_a_hangup_that_nohup_has_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        listening = SignalForwarder()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        listening.close()
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        listening = SignalForwarder()
        assert signal.getsignal(signal.SIGHUP) == listening._on_signal
        listening.close()
    finally:
        signal.signal(signal.SIGHUP, before)
