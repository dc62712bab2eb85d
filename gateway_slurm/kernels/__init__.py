"""One kernel from START to EXIT, and its return after the server's restart. Knows no jupyter_client and no HTTP."""
