"""Texts in, vectors out: chunking, the heap, the scheduler, the model's thread, and the limits that they keep to."""
