"""Starts one vLLM server: picks the device, prepares model and environment, then becomes the server."""
