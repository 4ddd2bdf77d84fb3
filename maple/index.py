"""Top-k: the exact blocked product and FAISS behind one function, and top-k of dense score rows.

Ties break by a fixed pseudo-random rank of the item id, so that results are reproducible and never flatter a code order.
"""
