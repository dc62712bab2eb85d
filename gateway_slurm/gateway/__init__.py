"""The shared gateway: one deployment for many users, an application on jupyter_server."""
