"""Talking to launchers: frames, envelope, flow control, the response socket and the tunnel."""
