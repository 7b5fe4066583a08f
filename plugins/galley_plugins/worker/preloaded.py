"""What the fork server of `preloading` imports: all that an engine core or a worker on a CPU imports."""

import os

import vllm.v1.engine.core
import vllm.v1.executor.multiproc_executor
import vllm.v1.worker.cpu_worker  # noqa: F401
from vllm.utils.system_utils import set_process_title

from galley_plugins.processes import die_with

die_with(os.getppid())  # the API server; what was forked from here goes with it
set_process_title("ForkServer")  # also where its processes will have theirs, which is found only once
