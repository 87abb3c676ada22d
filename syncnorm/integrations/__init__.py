"""Plug-ins for training frameworks. Each module here needs its framework; `import syncnorm` imports none of them."""
