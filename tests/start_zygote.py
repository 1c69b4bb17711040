"""`python -m tests.start_zygote ADDRESS`: the process that ranks are forked from (zygote.py). Its key is in stdin."""

import multiprocessing
import sys
from multiprocessing.connection import Client

from tests.zygote import serve

if __name__ == "__main__":
    key = sys.stdin.buffer.read()
    multiprocessing.current_process().authkey = key  # pipes are handed over with it
    serve(Client(sys.argv[1], "AF_UNIX", authkey=key))
