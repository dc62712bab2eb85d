"""What the tests share: real servers, clusters, users and networks, and the clients that look at them."""

from pathlib import Path

# Some modules are programs that tests run as processes; others are imported by such programs, from this one's parent.
HELPERS = Path(__file__).parent
