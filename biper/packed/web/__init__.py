"""Packed networks as a web page, and as a module for JavaScript: C compiled to WebAssembly."""
