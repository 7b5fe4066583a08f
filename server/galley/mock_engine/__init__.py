"""A worker without a model: OpenAI-shaped answers, scripted delays and faults, and gates in place of sleeps.

It serves tests of the gateway and load tests of the gateway alone. What it answers follows from the request.
"""

from galley.mock_engine.engine import MockEngine
from galley.mock_engine.script import Fault, Script
from galley.mock_engine.server import listen, serve

__all__ = ["Fault", "MockEngine", "Script", "listen", "serve"]
