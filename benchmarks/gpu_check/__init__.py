"""`python -m benchmarks.gpu_check`: what Gearshift does on a GPU, in under ten minutes. With --cpu
the same code runs in tiny sizes, so that it does not fail on a card for a typo.
"""
