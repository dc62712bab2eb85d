"""The program that runs on the login node. It arrives as text through a channel; no file of it stays there."""
