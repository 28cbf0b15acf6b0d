"""Quantization: the weights of a model in few bits each.

`data_types` are the levels that a weight can be rounded to, `grouping` says which weights share a scale, `tensor`
rounds a tensor and counts its bits (`kernels` does so on CUDA), `distortion` measures what that costs. `outliers` keeps
the few large ones apart, as LLM.int8 does. `four_bit` and `production` are the 4-bit path of QLoRA, ours and
bitsandbytes'. `gptq` and `awq` choose better than rounding with the help of `calibration`, and `methods` applies any of
them to a model. `perplexity` is the final judge. `limits` has what a page says before any of it is loaded.
"""
