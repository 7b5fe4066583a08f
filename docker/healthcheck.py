"""A container's health check: `healthcheck.py PORT PATH` fails unless this container answers with status 200.

It needs no curl in the image, and no proxy of the environment comes between.
"""

import http.client
import sys

TIMEOUT_SECONDS = 5

port, path = int(sys.argv[1]), sys.argv[2]
connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_SECONDS)
try:
    connection.request("GET", path)
    status = connection.getresponse().status
except (OSError, http.client.HTTPException) as error:
    sys.exit(f"port {port} does not answer: {error}")
if status != 200:
    sys.exit(f"{path}: found status {status}, expected 200")
