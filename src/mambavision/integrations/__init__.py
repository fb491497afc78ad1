"""The network at home in other libraries; each of them is registered by the import of its own module."""
