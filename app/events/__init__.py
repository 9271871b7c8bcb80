"""What Atlas says, and what it means: pure decisions, without a database or a socket.

In the order of a webhook: `signature` proves it, `payload` reads it, `identity`
recognises it, `lifecycle` says what it does to its envelope.
"""
