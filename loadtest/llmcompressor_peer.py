"""What quantized weights are compared with: llm-compressor's round to nearest, and its GPTQ, with data.

It runs in a virtual environment of its own (`python loadtest/quantization_peers.py` makes it) and gives
weights back as the numbers that its codes stand for, with scales in bfloat16 as Galley stores them.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from loadtest.peer_environments import PeerEnvironment, PeerError, own_environment

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

VERSION = "0.14.0.1"
PACKAGE = f"llmcompressor=={VERSION}"
PROGRAM = Path(__file__).with_name("llmcompressor_program.py")
SECONDS = 3600.0
SCALE_BITS = 16


@dataclass(frozen=True)
class PeerOptions:
    """
    Attributes:
        method: `rtn` without data, `gptq` with.
        group_size: inputs that share a scale; 0 is a whole channel.
    """

    method: Literal["rtn", "gptq"]
    group_size: int = 0
    bits: int = 4

    def bits_per_weight(self, inputs: int) -> float:
        """Of a matrix: codes and scales."""
        return self.bits + SCALE_BITS / (self.group_size or inputs)


@dataclass(frozen=True)
class PeerResult:
    """Seconds that quantizing took, without loading, by the clock and of all cores; float32 by module."""

    seconds: float
    cpu_seconds: float
    threads: int
    weights: dict[str, torch.Tensor]


def environment() -> PeerEnvironment:
    """With the torch that Galley has."""
    torch = f"torch=={metadata.version('torch').split('+')[0]}"
    return PeerEnvironment(f"llmcompressor-{VERSION}", (f"{PACKAGE} {torch}",))


def quantized(folder: Path, options: PeerOptions, sequences: Sequence[Sequence[int]] = ()) -> PeerResult:
    """The decoder's linear maps of a plain checkpoint.

    Args:
        sequences: token ids to calibrate with; only `gptq` takes some.

    Raises:
        PeerError: it is not installed, fails, or takes no such group size.
    """
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory(prefix="galley-peer-") as place:
        out = Path(place) / "weights.safetensors"
        request: dict[str, Any] = {
            "model": str(folder),
            "out": str(out),
            "method": options.method,
            "bits": options.bits,
            "group_size": options.group_size,
            "sequences": [list(ids) for ids in sequences] if options.method == "gptq" else [],
        }
        command = [str(environment().python()), str(PROGRAM)]
        try:
            done = subprocess.run(
                command,
                input=json.dumps(request),
                env=own_environment(),
                cwd=place,
                capture_output=True,
                text=True,
                check=True,
                timeout=SECONDS,
            )
            said = json.loads(done.stdout.splitlines()[-1])
            seconds, processor = float(said["seconds"]), float(said["cpu_seconds"])
            threads = int(said["threads"])
        except (subprocess.SubprocessError, OSError) as error:
            last = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1:]
            raise PeerError(f"llm-compressor, {options}: {' '.join(last)}") from error
        except (ValueError, IndexError, KeyError) as error:
            raise PeerError(f"llm-compressor, {options}: found {done.stdout[-200:]!r}") from error
        return PeerResult(seconds, processor, threads, load_file(out))
