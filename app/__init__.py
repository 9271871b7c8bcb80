"""Atlas Receiver: the service behind an Atlas `webhook_url`."""

__version__ = "0.1.0"
