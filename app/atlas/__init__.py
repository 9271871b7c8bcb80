"""Atlas as a server: what we ask it, and what we understand of its answers."""
