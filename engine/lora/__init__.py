"""Low-rank adaptation: a small trained update beside frozen layers (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

`layer` is the idea, `linear` an adapted linear layer and its variants, `product` their fast arithmetic, `injection`
adapts a model, `adapter_files` exchanges adapters with PEFT, `adapter_config` reads their settings, `spectrum` looks at
what was learned.
"""
