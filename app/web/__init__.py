"""Faces of the service: the public door, and what other services may ask."""
