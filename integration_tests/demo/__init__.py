"""The whole way once, on a real model: train, quantize, fine-tune, serve.

``python -m demo --output DIR`` against the installed packages. It prints one table, writes DIR/report.json, and exits 1 naming what
missed if anything did.
"""
