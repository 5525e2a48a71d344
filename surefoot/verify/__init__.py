"""Proof that a model computes the right thing, and the name of what is wrong when it does not.

`run.verify(reference, target, settings)` works off the checks in order and returns a `proof.Proof`, whose verdict
`gate.decide` recomputes from the raw per-token metrics stored in it.
"""
