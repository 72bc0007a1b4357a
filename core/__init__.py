"""The contracts of llmopt: errors, parameters, passes, the quantized weight, recipe, plan, manifest, target.

Nothing here imports more than the standard library and msgspec, so that a refused recipe costs nothing.
"""
