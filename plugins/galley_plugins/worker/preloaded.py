"""All that an engine core or a worker on a CPU imports; see `preloading`."""

import vllm.v1.engine.core
import vllm.v1.executor.multiproc_executor
import vllm.v1.executor.uniproc_executor
import vllm.v1.worker.cpu_worker  # noqa: F401
