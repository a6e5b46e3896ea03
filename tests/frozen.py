"""Imported last in a server of forks: a collection in a fork then writes to nothing of before."""

import gc

gc.collect()
gc.freeze()
