"""One operator family per file: launch, registration, public function. Their kernels are in `_kernels.py`."""
