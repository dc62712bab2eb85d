"""What runs on the login node. It is carried there as text, through a channel, and nothing of it stays."""
