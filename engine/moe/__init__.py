"""Mixtures of experts: layers of which every token uses a few parts only, and the router that says which.

`routing` decides who gets the token, `kinds` names the ways to decide, `selection_bias` and `balance` keep the experts
equally busy, `statistics` says how busy they are. `lora` is a mixture of low-rank adapters, `injection` puts it
on a model.
"""
