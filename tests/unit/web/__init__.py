"""The door and the API, driven as ASGI applications."""
