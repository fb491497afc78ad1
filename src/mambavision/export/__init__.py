"""Networks as files of other runtimes; each format is written, reloaded and compared with PyTorch."""
