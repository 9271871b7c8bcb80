"""What Atlas says, and what it means: pure decisions, without a database or a socket.

In the order of a webhook: `signature` proves it, `payload` reads it, `identity`
recognises it, `lifecycle` says what it does to its envelope.

`payload` goes through `reading` (bytes are one JSON object), `heading` (name and ids, or
nothing), `values` and `parties` (everything else, as far as it is usable).
"""
