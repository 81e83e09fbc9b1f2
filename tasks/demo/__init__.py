"""The demo: 200 orders go through the checkout, the worker is killed half-way, and the books must balance."""
