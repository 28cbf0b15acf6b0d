"""What the software measures itself against: `target` says what a target is, and the other modules measure them.

Needs no torch by itself; of its modules only `target` and `coverage` do not either.
"""
